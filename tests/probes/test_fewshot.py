"""Few-shot least squares against big_vision's official code, and against the textbook's formula."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vitssl.probes.fewshot import choose_shots, fewshot_accuracy, fewshot_predictions, least_squares

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"
CONFIG = json.loads((GOLDEN / "meta.json").read_text())["config"]
TABLE = json.loads((GOLDEN / "tables.json").read_text())["fewshot"]
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs"))
TRAIN, LABELS, QUERIES, ANSWERS = (INPUTS[f"{part}_{what}"] for part in ("train", "test") for what in ("features", "labels"))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['shots']} shots, seed {row['seed']}")
def test_big_visions_choice_weights_predictions_and_accuracy(row: dict) -> None:
    name = f"fewshot.seed{row['seed']}.shots{row['shots']}"
    chosen = choose_shots(LABELS.numpy(), shots=row["shots"], seed=row["seed"])
    assert chosen.tolist() == OUTPUTS[f"{name}.train_index"].tolist()
    few = TRAIN[chosen], LABELS[chosen]
    weights, _, _ = least_squares(*few, num_classes=CONFIG["classes"], l2=CONFIG["l2"])
    torch.testing.assert_close(weights, OUTPUTS[f"{name}.weights_float64"], rtol=0, atol=1e-12)
    predicted = fewshot_predictions(*few, QUERIES, num_classes=CONFIG["classes"])
    assert torch.equal(predicted, OUTPUTS[f"{name}.pred_float64"])
    assert (predicted != OUTPUTS[f"{name}.pred"]).sum() == row["pred_disagreements_f32_f64"], "theirs is float32"
    accuracy = fewshot_accuracy(TRAIN, LABELS, QUERIES, ANSWERS, shots=row["shots"], seed=row["seed"])
    assert accuracy == pytest.approx(row["accuracy_float64"], abs=1e-12)


@pytest.mark.parametrize(("samples", "width"), [(7, 30), (30, 7), (8, 8), (1, 3)])
def test_least_squares_is_the_textbooks(samples: int, width: int) -> None:
    draw = torch.Generator().manual_seed(samples)
    x, labels = torch.randn(samples, width, generator=draw), torch.arange(samples) % 3
    weights, *_ = least_squares(x, labels, num_classes=3, l2=2.0)
    white = (x.double().numpy() - x.double().mean(0).numpy()) / (x.double().numpy().std(0) + 1e-5)
    white = np.concatenate([white, np.full((samples, 1), 100.0)], axis=1)
    targets = 2 * np.eye(3)[labels.numpy()] - 1
    expected = np.linalg.solve(white.T @ white + 2 * np.eye(width + 1), white.T @ targets)
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-9)


def test_classes_with_fewer_samples_give_what_they_have() -> None:
    labels = np.array([5, 2, 2, 2, 5, 9])
    chosen = choose_shots(labels, shots=2, seed=3)
    assert labels[chosen].tolist() == [2, 2, 5, 5, 9] and len(set(chosen.tolist())) == 5
    assert choose_shots(labels, shots=2, seed=4).tolist() != chosen.tolist()

"""kNN against DINO's official code and a slow oracle."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from vitssl.probes.knn import knn_accuracy, knn_votes

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"
CONFIG = json.loads((GOLDEN / "meta.json").read_text())["config"]
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs"))
TABLE = json.loads((GOLDEN / "tables.json").read_text())["knn"]
BANK = INPUTS["train_features"].double(), INPUTS["train_labels"]
QUERIES = INPUTS["test_features"].double(), INPUTS["test_labels"]


@pytest.mark.parametrize("k", CONFIG["knn_k"])
def test_dinos_votes_predictions_and_accuracy(k: int):
    votes = knn_votes(*BANK, QUERIES[0], num_classes=CONFIG["classes"], k=k, temperature=CONFIG["T"])
    expected = OUTPUTS[f"knn.k{k}.votes"]
    torch.testing.assert_close(votes, expected, rtol=0, atol=1e-9 * expected.max().item())
    assert torch.equal(votes.argmax(dim=1), OUTPUTS[f"knn.k{k}.pred"])
    accuracy = knn_accuracy(*BANK, *QUERIES, k=k, temperature=CONFIG["T"])
    assert 100 * accuracy == pytest.approx(TABLE[str(k)]["top1"], abs=1e-9)


@pytest.mark.parametrize("k", [1, 20])
def test_float32_predicts_the_same(k: int):
    votes = knn_votes(BANK[0].float(), BANK[1], QUERIES[0].float(), num_classes=CONFIG["classes"], k=k)
    assert (votes.argmax(dim=1) == OUTPUTS[f"knn.k{k}.pred"]).double().mean() > 0.99


def slow_votes(features: Tensor, labels: Tensor, query: Tensor, *, num_classes: int, k: int, temperature: float) -> list[float]:
    """One query, in plain Python: sort all similarities, let the first k vote."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    rows = [(cosine(row, query.tolist()), label) for row, label in zip(features.tolist(), labels.tolist())]
    votes = [0.0] * num_classes
    for similarity, label in sorted(rows, reverse=True)[:k]:
        votes[label] += math.exp(similarity / temperature)
    return votes


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 5), st.floats(0.05, 2.0), st.integers(0, 10**6))
def test_the_slow_oracle_and_any_chunk(bank: int, k: int, chunk: int, temperature: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(bank, 3, generator=generator, dtype=torch.float64)
    queries = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (bank,), generator=generator)
    votes = knn_votes(features, labels, queries, num_classes=4, k=k, temperature=temperature, chunk=chunk)
    oracle = [slow_votes(features, labels, query, num_classes=4, k=k, temperature=temperature) for query in queries]
    torch.testing.assert_close(votes, torch.tensor(oracle, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(votes, knn_votes(features, labels, queries, num_classes=4, k=k, temperature=temperature))


def test_lengths_of_features_do_not_matter():
    scales = torch.linspace(0.1, 9, len(BANK[0]), dtype=torch.float64)[:, None]
    votes = knn_votes(BANK[0] * scales, BANK[1], 3 * QUERIES[0], num_classes=12)
    torch.testing.assert_close(votes, knn_votes(*BANK, QUERIES[0], num_classes=12))


def test_answers_outside_the_bank_are_wrong_not_an_error():
    features, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn_accuracy(features, labels, features, torch.tensor([0, 1, 7]), k=1) == pytest.approx(2 / 3)


def test_a_low_temperature_is_the_nearest_neighbour():
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 8, generator=generator) for n in (300, 100))
    labels = torch.randint(3, (300,), generator=generator)
    nearest = knn_votes(bank, labels, queries, num_classes=3, k=1).argmax(dim=1)
    for temperature in (0.012, 0.01, 0.002):
        votes = knn_votes(bank, labels, queries, num_classes=3, k=20, temperature=temperature)
        assert votes.isfinite().all() and (votes.argmax(dim=1) == nearest).double().mean() > 0.75

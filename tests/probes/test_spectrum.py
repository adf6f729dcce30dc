"""RankMe against the published implementation, alpha-ReQ against its stored formula, and both where the answer is known."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitssl.probes.spectrum import alpha_req, rankme

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs"))


@pytest.mark.parametrize("number", [0, 1])
def test_published_numbers(number: int) -> None:
    features = INPUTS[f"embeddings{number}"]
    expected = {key.partition(".")[2]: value.item() for key, value in OUTPUTS.items() if key.startswith(f"rank{number}.rankme")}
    assert rankme(features, eps=1e-5) == pytest.approx(expected["rankme_stable_pretraining"], rel=1e-12)
    assert rankme(features) == pytest.approx(expected["rankme_paper_eps1e-7"], rel=1e-12)
    assert alpha_req(features) == pytest.approx(OUTPUTS[f"rank{number}.alpha_req_own_full_range"].item(), rel=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_rank_of_equal_directions(rank: int) -> None:
    basis = torch.linalg.qr(torch.randn(50, 20, generator=torch.Generator().manual_seed(0)))[0]
    assert rankme(basis[:, :rank] @ torch.eye(20)[:rank]) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_a_power_law_is_found(alpha: float) -> None:
    left = torch.linalg.qr(torch.randn(400, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    left = torch.linalg.qr(torch.cat([torch.ones(400, 1, dtype=torch.float64), left], dim=1))[0][:, 1:]  # centred columns
    scale = torch.arange(1, 22, dtype=torch.float64) ** (-alpha / 2)
    assert alpha_req(left * scale) == pytest.approx(alpha, rel=1e-9)
    assert math.isnan(alpha_req(torch.ones(5, 3)))

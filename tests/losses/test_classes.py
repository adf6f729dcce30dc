"""What other classifiers say, against the official numbers and a slow oracle."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitssl.losses.classes import distillation

VARIANTS = Path(__file__).parents[1] / "golden" / "vit_variants"
KD = json.loads((VARIANTS / "meta.json").read_text())["config"]["kd"]  # (kind, alpha, temperature) of each case


@pytest.mark.parametrize("case", range(len(KD)))
@pytest.mark.parametrize("base", ["ls", "soft"])
def test_distillation_equals_deit(case: int, base: str):
    """Loss and both gradients of (1 - alpha) x base + alpha x distillation; the official base losses are timm's."""
    kind, alpha, temperature = KD[case]
    inputs, expected = (load_file(VARIANTS / f"{name}.safetensors") for name in ("inputs", "outputs"))
    logits, logits_kd, teacher = (inputs[name].double().requires_grad_() for name in ("logits", "logits_kd", "teacher_logits"))
    targets = inputs["labels"] if base == "ls" else inputs["soft_labels"].double()
    loss = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1 if base == "ls" else 0.0)
    if kind != "none":
        loss = (1 - alpha) * loss + alpha * distillation(logits_kd, teacher, kind=kind, temperature=temperature)
    loss.backward()
    found = {"loss": loss.detach(), "grad_logits": logits.grad}
    found |= {"grad_logits_kd": logits_kd.grad} if kind != "none" else {}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[f"kd{case}.{base}.{name}"], rtol=1e-12, atol=1e-14)
    assert teacher.grad is None


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_distillation_by_a_slow_oracle(temperature: float):
    logits, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    total = 0.0
    for row, other in zip(logits, teacher):
        p, q = ((each / temperature).exp() / (each / temperature).exp().sum() for each in (row, other))
        total += float((q * (q.log() - p.log())).sum())
    loss = distillation(logits, teacher, kind="soft", temperature=temperature)
    assert float(loss) == pytest.approx(total * temperature**2 / 12)
    assert float(distillation(teacher, teacher, kind="soft", temperature=temperature)) == pytest.approx(0, abs=1e-15)

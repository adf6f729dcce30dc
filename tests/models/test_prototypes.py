"""The head of self-distillation against three official ones, and the centre by its definition."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vitssl.models.prototypes import Centre, PrototypeHead

GOLDEN = Path(__file__).parents[1] / "golden"


def official(folder: str, prefix: str, *, fixed_norm: bool) -> tuple[PrototypeHead, dict, dict]:
    """A head with official weights, which need no other names; what goes in, and what comes out."""
    weights, inputs, outputs = (load_file(GOLDEN / folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs"))
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    own = {name: value for name, value in own.items() if not name.startswith("last_layer2")}
    shapes = {"dim": own["mlp.0.weight"].shape[1], "hidden": len(own["mlp.0.weight"]), "bottleneck": len(own["mlp.4.weight"])}
    head = PrototypeHead(**shapes, prototypes=len(own["last_layer.weight_g"]), layers=3, fixed_norm=fixed_norm)
    head.load_state_dict(own, strict=True)
    return head.double(), inputs, outputs


@pytest.mark.parametrize("fixed_norm", [True, False])
def test_head_and_gradients_equal_dino(fixed_norm: bool):
    head, inputs, outputs = official("dino", "student.head.", fixed_norm=fixed_norm)
    if fixed_norm:
        head.last_layer.weight_g.data.fill_(1.0)
    kind, x = f"head_norm_last_{str(fixed_norm).lower()}", inputs["head_in"].double().requires_grad_()
    logits = F.linear(head(x), head.last_layer())
    torch.testing.assert_close(logits.detach(), outputs[f"{kind}.out"], rtol=1e-11, atol=1e-13)
    (logits**3).sum().backward()
    torch.testing.assert_close(x.grad, outputs[f"{kind}.grad_in"], rtol=1e-9, atol=1e-13)
    expected = {name.rpartition("/")[2]: value for name, value in outputs.items() if name.startswith(f"{kind}_grad/")}
    found = {name: parameter.grad for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


def test_head_equals_dinov2_and_ibot():
    head, inputs, outputs = official("dinov2", "head.", fixed_norm=False)
    found = F.linear(head(inputs["head_in"].double()), head.last_layer())
    torch.testing.assert_close(found.detach(), outputs["head.out"], rtol=1e-11, atol=1e-13)
    head, inputs, outputs = official("ibot", "student.head.", fixed_norm=False)
    found = F.linear(head(inputs["head_in"].double()), head.last_layer()).detach()  # a class token, then patches
    torch.testing.assert_close(found[:, 0], outputs["head.cls"], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found[:, 1:], outputs["head.patch"], rtol=1e-11, atol=1e-13)


def test_a_new_head_is_the_official_initialisation():
    torch.manual_seed(0)
    head = PrototypeHead(64, prototypes=50, hidden=128, bottleneck=16, layers=2, fixed_norm=True)
    assert [name for name, p in head.named_parameters() if not p.requires_grad] == ["last_layer.weight_g"]
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05) and not head.mlp[0].bias.any()
    torch.testing.assert_close(head.last_layer().norm(dim=1), torch.ones(50))
    torch.testing.assert_close(head(torch.randn(3, 5, 64)).norm(dim=-1), torch.ones(3, 5))
    normed = PrototypeHead(64, prototypes=50, hidden=128, bottleneck=16, layers=3, fixed_norm=True, norm=True)
    assert [type(part).__name__ for part in normed.mlp] == ["Linear", "BatchNorm", "GELU"] * 2 + ["Linear"]
    assert isinstance(
        PrototypeHead(8, prototypes=3, hidden=4, bottleneck=2, layers=1, fixed_norm=True).mlp, torch.nn.Sequential
    )


def test_a_centre_follows_the_mean_of_all_it_has_seen_in_a_step():
    centre, prototypes = Centre(6, momentum=0.9).double(), torch.randn(6, 3).double()
    parts, expected = [torch.randn(num, 3).double() for num in (4, 1, 7)], torch.zeros(6).double()
    for step in range(2):
        for part in parts:
            centre.see(part + step, prototypes)
        torch.testing.assert_close(centre.centre, expected)  # a step's own come after it
        centre.follow()
        logits = (torch.cat(parts) + step) @ prototypes.T
        expected = 0.9 * expected + 0.1 * logits.mean(dim=0)
        torch.testing.assert_close(centre.centre, expected)
    centre.follow()
    centre.see(torch.empty(0, 3).double(), prototypes)
    centre.follow()
    torch.testing.assert_close(centre.centre, expected)
    assert list(centre.state_dict()) == ["centre"]

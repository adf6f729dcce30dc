"""Losses over prototypes: against a loop over pairs and patches, the official numbers, and themselves in parts."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from vitssl.losses.clusters import koleo, mean_entropy, pair_cross_entropy, row_cross_entropy, sinkhorn_centre

DINOV2 = Path(__file__).parents[1] / "golden" / "dinov2"
INPUTS, OUTPUTS = (load_file(DINOV2 / f"{name}.safetensors") for name in ("inputs", "outputs"))
TEMPERATURES = {"temperature": 0.1, "teacher_temperature": 0.07}


def doubled(name: str, *index: int) -> Tensor:
    return INPUTS[name][index].double()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plainly(logits: Tensor, target: Tensor, centre: Tensor) -> Tensor:
    """Cross entropy of one row with one other, by its definition."""
    p = (logits / 0.1).exp() / (logits / 0.1).exp().sum()
    q = ((target - centre) / 0.07).exp() / ((target - centre) / 0.07).exp().sum()
    return -(q * p.log()).sum()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("logits", [1 << 26, 60, 1], ids=["at once", "parts", "row by row"])
def test_pairs_by_a_slow_oracle(logits: int, shared: bool):
    student, teacher = F.normalize(drawn(4, 5, 3), dim=-1).requires_grad_(), F.normalize(drawn(4, 2, 3, seed=1), dim=-1)
    prototypes, others = F.normalize(drawn(6, 3, seed=2), dim=-1).requires_grad_(), F.normalize(drawn(6, 3, seed=3), dim=-1)
    centre = 0.1 * drawn(6, seed=4)
    terms = [
        plainly(prototypes @ student[b, v], others @ teacher[b, t], centre)
        for t in range(2) for v in range(5) for b in range(4) if t != v or not shared
    ]  # fmt: skip
    expected = torch.stack(terms).mean()
    wanted = torch.autograd.grad(expected, [student, prototypes])
    options = TEMPERATURES | {"shared": shared, "logits": logits}
    loss, entropy, mean = pair_cross_entropy(student, teacher, prototypes, others, centre, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, gradient in zip(torch.autograd.grad(loss, [student, prototypes]), wanted):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)
    chosen = torch.distributions.Categorical(logits=(teacher @ others.T - centre) / 0.07)
    torch.testing.assert_close(entropy, chosen.entropy().mean())
    torch.testing.assert_close(mean, chosen.probs.mean(dim=(0, 1)))
    assert not entropy.requires_grad and not mean.requires_grad


@pytest.mark.parametrize("logits", [1 << 26, 24, 1], ids=["at once", "parts", "row by row"])
@pytest.mark.parametrize("num", [7, 0])
def test_rows_by_a_slow_oracle(num: int, logits: int):
    student, teacher, weights = drawn(num, 3).requires_grad_(), drawn(num, 3, seed=1), drawn(num, seed=2).abs()
    prototypes, others, centre = drawn(6, 3, seed=3).requires_grad_(), drawn(6, 3, seed=4), drawn(6, seed=5)
    terms = [w * plainly(prototypes @ s, others @ t, centre) for s, t, w in zip(student, teacher, weights)]
    expected = sum(terms, 0.0 * (student.sum() + prototypes.sum()))
    wanted = torch.autograd.grad(expected, [student, prototypes])
    loss = row_cross_entropy(student, teacher, weights, prototypes, others, centre, **TEMPERATURES, logits=logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, gradient in zip(torch.autograd.grad(loss, [student, prototypes]), wanted):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("logits", [1 << 26, 24, 1], ids=["at once", "parts", "row by row"])
def test_the_mean_choice_by_a_slow_oracle(logits: int):
    """Number by number; and with another process, whose sums a ``total`` adds."""
    rows, prototypes = drawn(7, 3).requires_grad_(), drawn(6, 3, seed=1).requires_grad_()
    choices = [[(p @ row / 0.5).exp() / sum((q @ row / 0.5).exp() for q in prototypes) for p in prototypes] for row in rows]
    means = [sum(choice[p] for choice in choices) / 7 for p in range(6)]
    expected = -sum(mean * mean.log() for mean in means)
    wanted = torch.autograd.grad(expected, [rows, prototypes])
    found = mean_entropy(rows, prototypes, temperature=0.5, logits=logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for own, gradient in zip(torch.autograd.grad(found, [rows, prototypes]), wanted):
        torch.testing.assert_close(own, gradient, rtol=1e-10, atol=1e-14)
    rest = F.softmax(rows[3:] @ prototypes.T / 0.5, dim=-1).sum(dim=0)
    both = mean_entropy(rows[:3], prototypes, temperature=0.5, total=lambda sums: sums + rest, logits=logits)
    torch.testing.assert_close(both, expected, rtol=1e-12, atol=0)


def test_prototypes_that_nobody_chooses_do_not_break_the_mean_choice():
    rows = torch.eye(4)[:2].requires_grad_()
    found = mean_entropy(rows, torch.eye(4), temperature=1e-3)
    found.backward()
    assert float(found) == pytest.approx(math.log(2)) and torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("logits", [1 << 26, 36])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("rows_first", [False, True])
def test_sinkhorn_by_a_slow_oracle(rows_first: bool, iterations: int, logits: int):
    """A table of prototypes x rows made to sum to the same along one side, then the other."""
    rows, prototypes = F.normalize(drawn(9, 4), dim=-1), F.normalize(drawn(6, 4, seed=1), dim=-1)
    table = (prototypes @ rows.T / 0.05).exp()
    table = table / table.sum(dim=0, keepdim=True) if rows_first else table
    for _ in range(iterations):
        table = table / table.sum(dim=1, keepdim=True) / 6
        table = table / table.sum(dim=0, keepdim=True) / 9
    options = {"iterations": iterations, "rows_first": rows_first, "logits": logits}
    centre = sinkhorn_centre(rows, prototypes, temperature=0.05, **options)
    found = ((rows @ prototypes.T - centre) / 0.05).softmax(dim=-1)
    torch.testing.assert_close(found, table.T * 9, rtol=1e-11, atol=1e-15)


def test_sinkhorn_does_not_overflow():
    """The official table of exponents would, at logits of 40 under a temperature of 0.04."""
    rows = (40 * torch.eye(8)).repeat(2, 1)
    centre = sinkhorn_centre(rows, torch.eye(8), temperature=0.04)
    torch.testing.assert_close(((rows - centre) / 0.04).softmax(dim=-1), rows / 40)


@pytest.mark.parametrize("kind, rows", [("dino", 4), ("ibot", 4)])
def test_sinkhorn_equals_dinov2_on_one_process_and_two(kind: str, rows: int):
    """The official code computes in fp32. Two processes: the other's sums, as a gather brings them."""
    logits = doubled({"dino": "t_cls", "ibot": "t_patch"}[kind], 0)
    centre = sinkhorn_centre(logits, torch.eye(16).double(), temperature=0.07)
    found = ((logits - centre) / 0.07).softmax(dim=-1)
    torch.testing.assert_close(found, OUTPUTS[f"one.{kind}"].double(), rtol=0, atol=1e-6)
    both = torch.cat([OUTPUTS[f"two.rank{rank}.{kind}"] for rank in range(2)])
    torch.testing.assert_close(found, both.double(), rtol=0, atol=1e-6)


def assigned(method: str, kind: str) -> tuple[Tensor, Tensor]:
    """DINOv2's teacher: (logits, its centre), where that is a mean after a step before it, of other logits."""
    logits, before = (doubled({"cls": "t_cls", "patch": "t_patch"}[kind], step) for step in (0, 1))
    if method == "sinkhorn":
        return logits, sinkhorn_centre(logits, torch.eye(16).double(), temperature=0.07)
    return logits, 0.1 * before.mean(dim=0)


@pytest.mark.parametrize("method, tolerance", [("centering", 1e-12), ("sinkhorn", 2e-6)])
def test_losses_and_gradients_equal_dinov2(method: str, tolerance: float):
    """The sum of its three terms. Its teacher's crops stand swapped; Sinkhorn is in fp32 there."""
    known = torch.eye(16).double()
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    teacher, centre = assigned(method, "cls")
    close(((teacher - centre) / 0.07).softmax(dim=-1), OUTPUTS[f"{method}.teacher_cls"])
    large, small = (doubled(name).requires_grad_() for name in ("s_global", "s_local"))
    crops = torch.cat([large.unflatten(0, (2, 4)), small.unflatten(0, (3, 4))]).transpose(0, 1)
    taught = teacher.unflatten(0, (2, 4)).flip(0).transpose(0, 1)
    pairs, _, _ = pair_cross_entropy(crops, taught, known, known, centre, **TEMPERATURES)
    close(pairs.detach(), OUTPUTS[f"{method}.scaled_local"] + OUTPUTS[f"{method}.scaled_global"])
    masks = INPUTS["masks"]
    weights = (1 / masks.sum(dim=1).double())[masks.nonzero()[:, 0]]
    patches, (teacher, centre) = doubled("s_patch").requires_grad_(), assigned(method, "patch")
    close(((teacher - centre) / 0.07).softmax(dim=-1), OUTPUTS[f"{method}.teacher_patch"])
    loss = row_cross_entropy(patches, teacher, weights, known, known, centre, **TEMPERATURES) / len(masks)
    close(loss.detach(), OUTPUTS[f"{method}.patch"])
    (pairs + loss).backward()
    for name, rows in {"s_global": large, "s_local": small, "s_patch": patches}.items():
        close(rows.grad, OUTPUTS[f"{method}.grad_{name}"])


def test_the_loss_of_all_patches_equals_dinov2():
    """Its other layout: patches in their places, of which the masked count; and images without one, that count nothing."""
    student, masks = doubled("s_patch_full").requires_grad_(), INPUTS["masks"]
    known, places = torch.eye(16).double(), masks.flatten().nonzero()[:, 0]
    weights = (1 / masks.sum(dim=1).double())[places // masks.shape[1]]
    rows = student.flatten(0, 1)[places], doubled("t_patch_full").flatten(0, 1)[places]
    loss = row_cross_entropy(*rows, weights, known, known, torch.zeros(16).double(), **TEMPERATURES) / len(masks)
    loss.backward()
    torch.testing.assert_close(loss.detach(), OUTPUTS["patch_full.loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, OUTPUTS["patch_full.grad"], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", ["koleo0", "koleo1"])
def test_koleo_equals_dinov2(case: str):
    rows = doubled(case).requires_grad_()
    loss = koleo(rows, rows, torch.arange(len(rows)))
    loss.backward()
    torch.testing.assert_close(loss.detach(), OUTPUTS[f"{case}.loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(rows.grad, OUTPUTS[f"{case}.grad"], rtol=1e-10, atol=1e-13)


def test_koleo_in_groups_is_that_of_official_processes():
    """Groups of a batch's rows stand for the processes of the official code; of a rest of one nothing is asked."""
    both = torch.cat([doubled("koleo0"), doubled("koleo1")[:6]])
    one, two = (koleo(part, part, torch.arange(6)) for part in both.split(6))
    torch.testing.assert_close(one, OUTPUTS["koleo0.loss"], rtol=1e-12, atol=0)
    whole = koleo(both, both, torch.arange(12), group=6)
    torch.testing.assert_close(whole, (one + two) / 2, rtol=1e-12, atol=0)
    own = torch.tensor([1, 8])
    shares = torch.stack([koleo(both[own[i::2]], both, own[i::2], group=6) for i in range(2)])
    torch.testing.assert_close(koleo(both[own], both, own, group=6), shares.mean())
    rest = both[:7].clone().requires_grad_()
    loss = koleo(rest, rest, torch.arange(7), group=6)
    loss.backward()
    torch.testing.assert_close(loss.detach(), one * 6 / 7, rtol=1e-12, atol=0)
    assert torch.isfinite(rest.grad).all() and not rest.grad[6].any()
    assert not torch.isclose(koleo(both, both, torch.arange(12)), whole)


def test_many_prototypes_take_the_memory_of_a_part():
    """What autograd keeps: in parts the rows themselves, at once the logits too."""

    def kept(logits: int) -> int:
        sizes: dict[int, int] = {}
        student, teacher, prototypes = drawn(64, 6, 4).requires_grad_(), drawn(64, 2, 4), drawn(500, 4).requires_grad_()

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            pair_cross_entropy(student, teacher, prototypes, drawn(500, 4), drawn(500), **TEMPERATURES, logits=logits)
        return sum(sizes.values())

    logits = 8 * 64 * 6 * 500
    assert kept(1 << 26) > 1.2 * logits and kept(8 * 500 * 8) < 0.1 * logits

"""I-JEPA against the official implementation: targets, predictions, gradients, three steps; and lengths that all agree on."""

import re

import pytest
import torch
from official_numbers import Golden, close
from torch import Tensor

from vitssl.errors import ConfigError
from vitssl.losses.regression import smooth_l1
from vitssl.models.encoder import Encoder
from vitssl.objectives import create
from vitssl.objectives.base import Nets
from vitssl.objectives.ijepa import IJEPA
from vitssl.objectives.mixture import Mixture
from vitssl.schedule import Clock

OFFICIAL = Golden("ijepa")
CONFIG = OFFICIAL.config
NAMES = {"predictor_embed": "embed", "predictor_blocks": "blocks", "predictor_norm": "norm", "predictor_proj": "predict"}


def official() -> Mixture:
    """The tiny official model with its weights, in float64."""
    arguments = {"embed_dim": CONFIG["dim"], "depth": CONFIG["depth"], "num_heads": CONFIG["heads"]}
    encoder = Encoder.create(
        "vit_tiny_patch16_224",
        image_size=CONFIG["img"],
        patch_size=CONFIG["patch"],
        class_token=False,
        positions="sincos",
        arguments=arguments | {"mlp_ratio": CONFIG["mlp_ratio"]},
    )
    predictor = {"dim": CONFIG["pdim"], "depth": CONFIG["pdepth"], "heads": CONFIG["pheads"], "mlp_ratio": CONFIG["mlp_ratio"]}
    objective = create("ijepa", {"predictor": predictor}, encoder.spec)
    task = Mixture(encoder, {"ijepa": objective}, mean=(0.5,) * 3, std=(0.5,) * 3)
    own = parameters(task)
    for name, value in OFFICIAL.weights.items():
        if name == "predictor.predictor_pos_embed":
            torch.testing.assert_close(objective.predictor.positions, value[0], rtol=0, atol=0)
        else:
            own.pop(name).data.copy_(value)
    assert not own
    return task.double()


def parameters(task: Mixture) -> dict[str, Tensor]:
    """By their official names."""
    found = {f"encoder.{name}": p for name, p in task.encoder.vit.named_parameters()}
    found |= {f"target_encoder.{name}": p for name, p in task.teacher.average.vit.named_parameters()}
    theirs = {ours: name for name, ours in NAMES.items()}
    for name, p in task.objectives["ijepa"].predictor.named_parameters():
        first, dot, rest = name.partition(".")
        found[f"predictor.{theirs.get(first, first)}{dot}{rest}"] = p
    return found


def masks_of(step: int) -> tuple[Tensor, Tensor]:
    """(keep [B, K], targets [B, M, n]) of an official step."""
    targets = [OFFICIAL.inputs[f"step{step}.pred_mask{k}"] for k in range(CONFIG["mask"]["npred"])]
    return OFFICIAL.inputs[f"step{step}.enc_mask0"], torch.stack(targets, dim=1)


def loss_of(task: Mixture, step: int) -> tuple[Tensor, Tensor, Tensor]:
    objective, images = task.objectives["ijepa"], OFFICIAL.inputs["imgs"][step].double()
    keep, targets = masks_of(step)
    nets = Nets(task.encoder, task.teacher)
    pred, features = objective.predict(nets, images, keep, targets), objective.features(nets, images, targets)
    return smooth_l1(pred, features), pred, features


def by_target(rows: Tensor) -> Tensor:
    """[B, M, n, D] -> the official order: target, then sample."""
    return rows.transpose(0, 1).flatten(0, 1)


def test_targets_predictions_and_every_gradient():
    task = official()
    seen = {}
    task.encoder.register_forward_hook(lambda _, args, tokens: seen.update(context=tokens.patches))
    task.teacher.register_forward_hook(lambda _, args, tokens: seen.update(whole=tokens.patches))
    loss, pred, features = loss_of(task, 0)
    close(seen["whole"], OFFICIAL.outputs["step0.target_tokens"], 1e-9)
    close(seen["context"], OFFICIAL.outputs["step0.context"], 1e-9)
    close(by_target(features), OFFICIAL.outputs["step0.targets"], 1e-9)
    close(by_target(pred), OFFICIAL.outputs["step0.pred"], 1e-9)
    close(loss, OFFICIAL.outputs["losses"][0], 1e-9)
    loss.backward()
    own = parameters(task)
    for name, expected in OFFICIAL.below("step0_grad/").items():
        close(own.pop(name).grad, expected, 1e-9)
    assert all(p.grad is None for p in own.values())  # positions, and all of the teacher


def test_three_steps():
    """AdamW with the official rates and decays, the teacher moved after each step."""
    task = official()
    vectors = [p for name, p in task.named_parameters() if p.requires_grad and (p.ndim == 1 or name.endswith("bias"))]
    others = [p for p in task.parameters() if p.requires_grad and all(p is not each for each in vectors)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": vectors, "weight_decay": 0.0}])
    for step in range(CONFIG["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = OFFICIAL.outputs["sched.lr"][step].item()
        optimizer.param_groups[0]["weight_decay"] = OFFICIAL.outputs["sched.wd"][step].item()
        loss, _, _ = loss_of(task, step)
        close(loss, OFFICIAL.outputs["losses"][step], 1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.teacher.update(OFFICIAL.outputs["sched.ema"][step].item())
    own = parameters(task)
    for part in ("encoder", "target_encoder", "predictor"):
        for name, expected in OFFICIAL.below(f"final_{part}/").items():
            close(own[f"{part}.{name}"], expected, 1e-8)  # Adam divides the smallest gradients by themselves


def test_the_teacher_s_momentum_is_the_official_one():
    """Linear from .996; the official run ends at a fifth of the way before 1, by its ipe_scale of 1.25, ours at 1."""
    official = OFFICIAL.outputs["sched.ema"].tolist()
    total = int(CONFIG["opt"]["iterations_per_epoch"] * CONFIG["opt"]["num_epochs"] * CONFIG["opt"]["ipe_scale"])
    assert [IJEPA.momentum.over(total).at(step) for step in range(len(official))] == pytest.approx(official, rel=1e-12)
    assert IJEPA.judges_teacher


def small(**settings: object) -> IJEPA:
    spec = Encoder.create("test_vit", image_size=56, patch_size=4).spec
    return create("ijepa", {"predictor": {"dim": 16, "depth": 1}, **settings}, spec)


def test_lengths_follow_from_seed_and_step_alone():
    objective, clocks = small(), [Clock(step, 100, 0, seed) for step in range(60) for seed in (0, 1)]
    found = [objective.sizes(clock) for clock in clocks]
    assert found == [objective.sizes(Clock(clock.step, 7, 99, clock.seed)) for clock in clocks]
    assert len(set(found[::2])) > 20 and found[::2] != found[1::2]
    assert all(length > 10 for _, _, length in found)
    assert min(length for _, _, length in found) < max(length for _, _, length in found)
    longer = small(shortest_of=1)
    assert sum(longer.sizes(clock)[2] for clock in clocks) > sum(length for _, _, length in found)


def test_what_is_shown_is_never_what_is_asked_for():
    objective, seen = small(), {}
    objective.predictor.register_forward_hook(lambda _, args, out: seen.update(keep=args[1], targets=args[2]))
    encoder = Encoder.create("test_vit", image_size=56, patch_size=4)
    task = Mixture(encoder, {"ijepa": objective}, mean=(0.5,) * 3, std=(0.5,) * 3)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        noise = torch.rand(16, 10, generator=generator, dtype=torch.float64)
        clock = Clock(step, 100, 0, 0)
        with torch.no_grad():
            shown = {"image": torch.randn(16, 3, 56, 56)}
            objective(Nets(encoder, task.teacher), shown, clock, lambda name, num, noise=noise: noise)
        assert seen["keep"].shape == (16, objective.sizes(clock)[2])
        for keep, targets in zip(seen["keep"].tolist(), seen["targets"].flatten(1).tolist()):
            assert len(set(keep)) == len(keep) and not set(keep) & set(targets)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"min_keep": 196}, "objectives.ijepa.min_keep=196 of 14x14 patches: there must be more"),
        ({"aspect": [1.5, 0.75]}, "is no range; write the smaller first"),
        ({"predictor": {"dim": 16, "heads": 5}}, "the predictor's width 16 is not divisible by its 5 heads"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        small(**settings)


def test_an_encoder_that_cannot_leave_patches_out_is_refused():
    encoder = Encoder.create("beit_base_patch16_224", image_size=32, arguments={"depth": 1}, class_token=None, registers=None)
    with pytest.raises(ConfigError, match=r"objectives.ijepa leaves patches out, and a Beit's relative positions"):
        create("ijepa", {}, encoder.spec)

"""MoCo v3 against the official code: features to keys, loss, gradients, the state after a step, schedules; on two processes.

There the average moves in the forward pass, between queries and keys; here after the step before. Both begin equal to the
student, so the keys are the same; the first of the official updates changes nothing, and ours has its momentum a step earlier.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitssl import dist
from vitssl.losses.contrast import info_nce
from vitssl.models.encoder import Encoder
from vitssl.objectives import create
from vitssl.objectives.base import Nets
from vitssl.objectives.mixture import Mixture
from vitssl.objectives.moco_v3 import MoCoV3
from vitssl.schedule import Clock, Schedule

GOLDEN = Path(__file__).parents[1] / "golden" / "moco_v3"
META = json.loads((GOLDEN / "meta.json").read_text())["config"]
TABLES = json.loads((GOLDEN / "tables.json").read_text())
WEIGHTS, INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("weights", "inputs", "outputs"))
CLOCK = Clock(step=0, total=10, samples=0, seed=7)
OWN = "objectives.moco_v3."


def ours(name: str) -> str:
    """An official name in our task."""
    name = re.sub(r"^predictor\.", f"{OWN}predictor.", name)
    name = re.sub(r"^base_encoder\.head\.", f"{OWN}projector.", name)
    name = re.sub(r"^momentum_encoder\.head\.", f"{OWN}keys.average.", name)
    name = re.sub(r"^base_encoder\.", "encoder.vit.", name)
    return re.sub(r"^momentum_encoder\.", "teacher.average.vit.", name)


def official_task() -> Mixture:
    """The tiny official model with its weights; its average stands elsewhere than its student, and has not moved yet."""
    arguments = {"embed_dim": META["dim"], "depth": META["depth"], "num_heads": META["heads"], "mlp_ratio": META["mlp_ratio"]}
    encoder = Encoder.create(
        "vit_tiny_patch16_224", image_size=META["img"], patch_size=META["patch"], positions="sincos", arguments=arguments
    )
    encoder.vit.patch_embed.requires_grad_(False)  # stop_grad_conv1
    settings = {"temperature": META["T"], "hidden": META["mlp_dim"], "out": META["moco_dim"]}
    objective = create("moco_v3", settings, encoder.spec)
    momentum = Schedule(META["m"], shape="constant")
    task = Mixture(encoder, {"moco_v3": objective}, momentum=momentum, mean=(0.5,) * 3, std=(0.5,) * 3).double().train()
    task.load_state_dict({ours(name): value.double() for name, value in WEIGHTS.items()}, strict=True)
    trains = {ours(name) for name, own in TABLES["requires_grad"].items() if own}
    assert trains == {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    return task


def close(found: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal to 1e-9 of the largest entry. That of norm.bias, which the first BatchNorm cancels, is rounding here and there."""
    atol = max(1e-9 * float(expected.abs().max()), 1e-14)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=atol, msg=lambda said: f"{name}: {said}")


def gradients(task: Mixture) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in task.named_parameters() if parameter.requires_grad}


def compared(task: Mixture, rows: slice = slice(None)) -> Tensor:
    """The loss after the average moved, with its gradient in the task."""
    task.after_step(CLOCK)
    views = {"first": INPUTS["x1"].double()[rows], "second": INPUTS["x2"].double()[rows]}
    loss, _ = task.objectives["moco_v3"](Nets(task.encoder, task.teacher), views, CLOCK, lambda name, num: None)
    loss.backward()
    return loss.detach()


def test_features_projections_queries_keys_and_loss():
    task, seen = official_task(), {name: [] for name in ("feat", "proj", "q", "k")}
    objective = task.objectives["moco_v3"]
    task.encoder.register_forward_hook(lambda _, given, tokens: seen["feat"].extend(tokens.cls.chunk(2)))
    parts = {"proj": objective.projector, "q": objective.predictor, "k": objective.keys}
    for name, part in parts.items():
        part.register_forward_hook(lambda _, given, out, name=name: seen[name].append(out))
    close(compared(task), OUTPUTS["one.loss"])
    for name, found in seen.items():
        for number, tensor in enumerate(found, 1):
            close(tensor.detach(), OUTPUTS[f"one.{name}{number}"], f"{name}{number}")
        assert number == 2


def test_every_gradient():
    task = official_task()
    compared(task)
    own = gradients(task)
    for name in [name for name in OUTPUTS if name.startswith("one_grad/")]:
        close(own.pop(ours(name.partition("/")[2])), OUTPUTS[name], name)
    assert not own


def test_the_average_and_every_buffer_afterwards():
    """The average's parameters moved once; its BatchNorms followed its own batches, the student's theirs."""
    task = official_task()
    compared(task)
    state, after = task.state_dict(), [name for name in OUTPUTS if name.startswith("one_after/")]
    found = {ours(name.partition("/")[2]): OUTPUTS[name] for name in after}
    assert {name for name in state if "running" in name or "average" in name} == set(found)
    for name, expected in found.items():
        close(state[name], expected, name)


def share_of_process() -> tuple[Tensor, dict[str, Tensor]]:
    task = official_task()
    loss = compared(task, slice(dist.rank(), None, dist.world()))
    return loss, {name: dist.sum_over_processes(each) / dist.world() for name, each in gradients(task).items()}


def test_two_processes_are_one(gang):
    """Official training synchronises its BatchNorms, so its reference is the numbers of one process."""
    (first, found), (second, again) = gang(2)(share_of_process)
    close((torch.as_tensor(first) + torch.as_tensor(second)) / 2, OUTPUTS["one.loss"])
    for name in [name for name in OUTPUTS if name.startswith("one_grad/")]:
        own = ours(name.partition("/")[2])
        close(found[own], OUTPUTS[name], name)
        close(again[own], OUTPUTS[name], name)


def test_with_batchnorms_of_their_own_two_processes_have_another_loss():
    """What the official code does without SyncBatchNorm: each half normalised by itself, keys of both. Ours never does, since
    its loss would depend on the number of processes; by hand it has the official numbers."""
    task = official_task()
    task.after_step(CLOCK)
    objective, queries, keys = task.objectives["moco_v3"], {}, {}
    for view in (1, 2):
        halves = INPUTS[f"x{view}"].double().chunk(2)
        queries[view] = [objective.predictor(objective.projector(task.encoder(half).cls)) for half in halves]
        keys[view] = [objective.keys(task.teacher(half).cls) for half in halves]
    losses = []
    for rank, own in enumerate(torch.arange(8).chunk(2)):
        for name, found in {"q": queries, "k": keys}.items():
            for view in (1, 2):
                close(found[view][rank].detach(), OUTPUTS[f"two.{name}{view}.rank{rank}"])
        pairs = [(queries[1][rank], torch.cat(keys[2])), (queries[2][rank], torch.cat(keys[1]))]
        losses.append(sum(info_nce(query, key, own, temperature=META["T"]) for query, key in pairs))
        close(losses[rank].detach(), OUTPUTS[f"two.loss.rank{rank}"])
    (sum(losses) / 2).backward()
    for name, found in gradients(task).items():
        expected = next(OUTPUTS[key] for key in OUTPUTS if key.startswith("two_avg_grad/") and ours(key[13:]) == name)
        close(found, expected, name)
    assert (sum(losses).detach() / 2 - OUTPUTS["one.loss"]).abs() > 0.01


@pytest.mark.parametrize("processes", [1, 2])
def test_the_contrast_alone(processes: int):
    """Queries of each process against the keys of all; a process's gradient is ``processes`` times that of the batch."""
    keys = INPUTS["k"].double()
    parts = zip(INPUTS["q"].double().chunk(processes), torch.arange(8).chunk(processes))
    losses, found = [], []
    for query, own in parts:
        query = query.clone().requires_grad_()
        loss = info_nce(query, keys, own, temperature=META["T"])
        loss.backward()
        losses.append(loss.detach())
        found.append(query.grad)
    close(torch.stack(losses).squeeze(), OUTPUTS[f"contrastive.loss_{processes}proc"])
    close(torch.cat(found), OUTPUTS[f"contrastive.grad_q_{processes}proc"])


def test_schedules():
    """Momentum without a warm-up, the rate with one; both per iteration, in fractions of an epoch."""
    sched = META["sched"]
    rate = Schedule(sched["lr"], warmup=sched["warmup_epochs"], total=sched["epochs"])
    assert MoCoV3.momentum.peak == sched["moco_m"]
    for row in TABLES["schedules"]:
        assert MoCoV3.momentum.over(sched["epochs"]).at(row["epoch"]) == pytest.approx(row["momentum"], rel=1e-12)
        assert rate.at(row["epoch"]) == pytest.approx(row["lr"], rel=1e-12, abs=1e-20)

"""From config and task to numbers: outlines without memory, counts, and an estimate of memory that autograd agrees with."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vitssl import dist
from vitssl.config import build
from vitssl.data.order import Layout
from vitssl.errors import ConfigError
from vitssl.models.adapters.timm_vit import fuse_attention
from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead
from vitssl.objectives.classify import Classify
from vitssl.plan import Stack, activation_memory
from vitssl.schedule import Clock
from vitssl.sections import ProgramConfig
from vitssl.task import Batch, Task
from vitssl.train import planning
from vitssl.train.planning import batch_split, make_plan, outline
from vitssl.views import View

CLOCK = Clock(step=0, total=10, samples=0, seed=0)


def config(**values) -> ProgramConfig:
    launch = {"device": "cpu", "precision": "fp32"} | values.pop("launch", {})
    return build(ProgramConfig, {"batch_size": 32, "launch": launch} | values, where="here")


def images(num: int, *, ignored: int = 0) -> SimpleNamespace:
    """What a plan asks of a source."""
    return SimpleNamespace(num_samples=num, ignored=ignored, by_chunk=False)


def classify(mae: nn.Module, **options) -> Classify:
    head = ClassificationHead(mae.encoder.spec.dim, 5, pooling="mean", norm=True)
    return Classify(mae.encoder, head, mean=(0.5,) * 3, std=(0.5,) * 3, **options)


def saved_bytes(task: Task, *, num: int, bf16: bool) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of ``num`` samples, each storage once."""
    view = next(iter(task.views)) if hasattr(task, "views") else View(size=task.encoder.spec.image_size)
    images = torch.zeros(num, 3, *view.size, dtype=torch.uint8)
    batch = Batch({view: images}, torch.arange(num), torch.zeros(num, dtype=torch.int64))
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = task(batch, CLOCK)  # keeps the graph, so that no storage is freed and its address used again
    assert loss.requires_grad
    return sum(storages.values())


def measured(task: Task, *, bf16: bool) -> float:
    """Bytes per sample: what grows with the batch, which parameters and their casts do not."""
    return (saved_bytes(task, num=4, bf16=bf16) - saved_bytes(task, num=2, bf16=bf16)) / 2


SHAPES = {
    "small patches": {"image": 32, "patch": 4, "dim": 48, "depth": 3, "heads": 3, "decoder": (32, 2, 2)},
    "wide": {"image": 32, "patch": 4, "dim": 144, "depth": 4, "heads": 3, "decoder": (96, 2, 3)},
    "large patches": {"image": 96, "patch": 16, "dim": 96, "depth": 4, "heads": 4, "decoder": (64, 4, 4)},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_estimate_of_mae_is_what_autograd_saves(
    shape: dict, checkpointing: bool, bf16: bool, fused: bool, small_mae: Callable
):
    """From seven tenths of it to twice as much; with checkpointing one recomputed block comes on top."""
    task = small_mae(**shape).train()
    for part in task.modules():
        if hasattr(part, "checkpointing"):
            part.checkpointing = checkpointing
    fuse_attention(task, fused)
    width = 2 if bf16 else 4
    again = max(stack.block(width=width, fused=fused) for stack in task.stacks()) if checkpointing else 0
    estimate = activation_memory(task.stacks(), width=width, fused=fused, checkpointing=checkpointing)
    assert 0.7 <= estimate / (measured(task, bf16=bf16) + again) <= 2


@pytest.mark.parametrize("bf16", [False, True])
def test_a_block_is_counted_exactly(bf16: bool, small_mae: Callable):
    """Two depths differ by blocks alone: to the per cent, but for norms' statistics and the softmax's sum."""
    for fused in (True, False):
        shallow, deep = (classify(small_mae(image=32, dim=96, depth=depth, heads=3)).train() for depth in (1, 3))
        fuse_attention(shallow, fused)
        fuse_attention(deep, fused)
        block = deep.stacks()[0].block(width=2 if bf16 else 4, fused=fused)
        assert 2 * block == pytest.approx(measured(deep, bf16=bf16) - measured(shallow, bf16=bf16), rel=0.015)


def test_fine_tuning_is_estimated_too_and_a_frozen_encoder_keeps_nothing(small_mae: Callable):
    tasks = [classify(small_mae(image=32, dim=96, depth=4, heads=3), mode=mode).train() for mode in ("full", "linear")]
    kept = [measured(task, bf16=False) for task in tasks]
    full, linear = (activation_memory(task.stacks(), width=4, fused=True, checkpointing=False) for task in tasks)
    assert 0.9 <= full / kept[0] <= 2
    assert kept[1] < linear < 0.3 * kept[0]


@pytest.mark.parametrize("stem", [{"stem": "t2t"}, {"name": "vit_tiny_r_s16_p8_224"}], ids=str)
def test_a_stem_is_counted_as_autograd_counts_it(stem: dict, small_mae: Callable):
    """Of a network without memory as of a real one, beside the blocks."""
    arguments = {"embed_dim": 48, "depth": 2, "num_heads": 2}
    body = Encoder.create(**{"name": "vit_tiny_patch16_224"} | stem, image_size=64, arguments=arguments)
    task = classify(SimpleNamespace(encoder=body)).train()
    for part in (task, copy.deepcopy(task).to("meta")):
        estimate = planning.activations(part, config(), "fp32")
        blocks = activation_memory(task.stacks(), width=4, fused=True, checkpointing=False)
        assert estimate > 3 * blocks and 0.7 <= estimate / measured(task, bf16=False) <= 2


def test_an_outline_takes_no_memory_and_counts_the_same(small_mae: Callable):
    real, shape = small_mae(dim=48), outline(lambda: small_mae(dim=48))
    tensors = [*shape.parameters(), *shape.buffers()]
    assert len(tensors) > 20 and all(tensor.is_meta for tensor in tensors)
    assert {name: p.shape for name, p in shape.named_parameters()} == {name: p.shape for name, p in real.named_parameters()}
    plans = [make_plan(config(), task, images(100)) for task in (real, shape)]
    assert plans[0] == plans[1]


def test_every_number_of_a_plan(small_mae: Callable):
    task = small_mae()
    settings = config(
        length="10ep",
        micro_batch=8,
        optim={"base_lr": 1e-3, "lr_rule": "linear/256", "warmup": "10%"},
        launch={"engine": "zero1"},
        data={"lanes": 3, "workers": 2},
    )
    task.couples_samples = True
    plan = make_plan(settings, task, images(1000, ignored=4))
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    frozen = task.encoder.vit.pos_embed.numel()
    assert (plan.steps, plan.epochs, plan.samples, plan.ignored) == (312, 9.984, 1000, 4)
    assert (plan.batch_size, plan.processes, plan.micro_batch, plan.accumulation, plan.loss_batch) == (32, 1, 8, 4, 32)
    assert any("goes forward twice" in cost for cost in plan.costs)
    assert (plan.lr, plan.lr_rule, plan.warmup_steps) == (1.25e-4, "0.001 x 32 / 256", 31)
    assert (plan.engine, plan.precision, plan.device, plan.workers) == ("zero1", "fp32", "cpu", 2)
    assert [layout[0] for layout in plan.layouts] == [3]
    assert make_plan(settings, task, images(1000), layouts=[Layout(5, 7, 2)]).layouts == [[5, 7, 2]], "as the run was begun"
    assert plan.parameters["frozen"] == frozen and plan.parameters["decay"] + plan.parameters["no_decay"] == trained
    assert plan.memory["optimiser"] == 8 * trained and plan.memory["gradients"] == 4 * trained
    each = activation_memory(task.stacks(), width=4, fused=True, checkpointing=False)
    assert plan.memory["activations (estimate)"] == 8 * each


@pytest.mark.parametrize(
    "launch, factors",
    [
        ({}, {"width": 4, "fused": True, "checkpointing": False}),
        ({"precision": "bf16"}, {"width": 2, "fused": False, "checkpointing": False}),  # as launch.py runs it on a CPU
        ({"checkpointing": True}, {"width": 4, "fused": True, "checkpointing": True}),
    ],
)
def test_the_micro_batch_is_the_largest_that_fits(launch: dict, factors: dict, small_mae: Callable, monkeypatch):
    task, settings = small_mae(), config(batch_size=96, launch=launch)
    state = sum(planning._state_memory(settings, task).values())
    each = activation_memory(task.stacks(), **factors)
    for room, found in [(96, (96, 1)), (95, (48, 2)), (13, (12, 8)), (1, (1, 96)), (0, (1, 96))]:
        memory = (state + (room + 0.5) * each) / planning.USABLE
        monkeypatch.setattr(planning, "_device_memory", lambda device, memory=memory: memory)
        assert batch_split(settings, task) == found


def test_a_batch_that_does_not_divide_is_refused(small_mae: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "world", lambda: 3)
    with pytest.raises(ConfigError, match=r"batch_size=32 does not divide over 3 processes"):
        make_plan(config(), small_mae(), images(100))


@pytest.mark.parametrize(
    "optim, key",
    [
        ({"clip": 1.0, "clip_by": "parameter"}, "clip_by=parameter"),
        ({"clip": 1.0, "clip_by": "module"}, "clip_by=module"),
        ({"name": "lars"}, "name=lars"),
    ],
)
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_norms_of_one_parameter_are_not_to_be_had_of_flat_partitions(optim: dict, key: str, engine: str, small_mae: Callable):
    settings = config(optim=optim, launch={"engine": engine})
    with pytest.raises(ConfigError, match=rf"optim.{key} with launch.engine={engine}: it goes by norms of single parameters"):
        make_plan(settings, small_mae(), images(100))


def test_memory_of_nothing():
    assert activation_memory([], width=4, fused=True, checkpointing=True) == 0
    assert Stack(10, 8, 0, 2).block(width=4, fused=False) == 10 * 8 * 64 + 2 * 100 * 4


def test_views_that_may_share_a_pass_are_recomputed_together():
    large, small, decoder = Stack(17, 32, 4, 2), Stack(5, 32, 4, 2), Stack(17, 16, 2, 2)
    options = {"width": 4, "fused": True}
    both, alone = (activation_memory(stacks, **options, checkpointing=True) for stacks in ([large, small], [large]))
    assert both - alone == 4 * 5 * 32 * 4 + 2 * small.block(**options)
    with_decoder = activation_memory([large, decoder], **options, checkpointing=True)
    assert with_decoder - alone == 2 * 17 * 16 * 4 + decoder.block(**options)  # one of the two at a time

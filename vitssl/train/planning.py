"""From config, task and machine to the plan's numbers: what is counted, measured or asked before anything is trained."""

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from vitssl import dist
from vitssl.data.layout import choose_layouts, choose_workers, costs, whole_lanes
from vitssl.data.order import Layout
from vitssl.data.sources import Source
from vitssl.errors import ConfigError
from vitssl.models.twin import Twin
from vitssl.plan import Plan, activation_memory, run_length, scaled_lr, split_batch, training_memory
from vitssl.sections import ProgramConfig
from vitssl.task import Rule, Task
from vitssl.train.launch import choose_precision, fuses_attention
from vitssl.train.optim import MOMENTS, group_parameters

CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
USABLE = 0.8  # of the device's memory: the rest is the allocator's, the libraries' and the estimate's


def outline(build: Callable[[], Task]) -> Task:
    """The task on the meta device: every shape and no memory, for counting."""
    with torch.device("meta"):
        return build()


def activations(task: Task, config: ProgramConfig, precision: str) -> int:
    """Estimated bytes that one sample's forward keeps for its backward."""
    width = 4 if precision == "fp32" else 2
    fused = fuses_attention(dist.choose_device(config.launch.device), precision)
    blocks = activation_memory(task.stacks(), width=width, fused=fused, checkpointing=config.launch.checkpointing)
    return blocks + _stem_memory(task, width)


def _stem_memory(task: Task, width: int) -> int:
    """What a stem of several layers keeps, as autograd says of one without memory; ``width`` bytes a number."""
    encoder = getattr(task, "encoder", None)
    if encoder is None or not encoder.spec.overlaps:
        return 0
    stem = copy.deepcopy(encoder.vit.patch_embed).to("meta")

    def numbers(num: int) -> int:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda none: none):
            stem(torch.zeros(num, encoder.spec.channels, *encoder.spec.image_size, device="meta"))
        return sum(kept)

    return width * (numbers(2) - numbers(1))


def batch_split(config: ProgramConfig, task: Task) -> tuple[int, int]:
    """(micro-batch, accumulation) for this machine; ``task`` may be an outline. Raises ConfigError with the arithmetic."""
    device = dist.choose_device(config.launch.device)
    each = activations(task, config, choose_precision(config.launch, device))
    free = USABLE * _device_memory(device) - sum(_state_memory(config, task).values())
    fits = max(1, int(min(config.batch_size, free / max(1, each))))
    return split_batch(config.batch_size, dist.world(), config.micro_batch, fits=fits)


def make_plan(
    config: ProgramConfig,
    task: Task,
    source: Source,
    *,
    layouts: Sequence[Layout] | None = None,
    waits: Mapping[str, int] | None = None,
) -> Plan:
    """Every derived number of the run. ``layouts`` of its order and the steps that a rule ``waits`` are those that it was begun
    with, where it was: a share of a longer run would make an encoder wait that has long begun.

    Raises ConfigError where the config cannot be run.
    """
    _refuse_flat_partitions(config)
    task.check_batch(config.batch_size)
    device = dist.choose_device(config.launch.device)
    precision = choose_precision(config.launch, device)
    micro_batch, accumulation = batch_split(config, task)
    samples = source.num_samples
    steps = run_length(config.length, samples=samples, batch_size=config.batch_size)
    groups = group_parameters(task)
    waits = _waits([group.rule for group in groups], waits, steps=steps, per_epoch=samples / config.batch_size)
    lr, rule = scaled_lr(config.optim.base_lr, config.optim.lr_rule, config.batch_size)
    each = activations(task, config, precision)
    chosen = choose_workers(config.data, device=device)
    layouts = layouts or choose_layouts(source, config.data, loaders=dist.world() * max(1, chosen))
    layouts = dist.gather_lists([list(layouts)])[0]  # the first process's: machines may know different things of the data
    workers, readers = whole_lanes(source, config.data, lanes=[each.lanes for each in layouts], workers=chosen)
    averaged = sum(p.numel() for part in task.modules() if isinstance(part, Twin) for p in part.parameters())
    frozen = sum(p.numel() for p in task.parameters() if not p.requires_grad) - averaged
    others = {"frozen": frozen, "average": averaged, "teacher": _companions(task)}
    others = {name: size for name, size in others.items() if size}
    return Plan(
        steps=steps,
        epochs=steps * config.batch_size / samples,
        samples=samples,
        ignored=source.ignored,
        batch_size=config.batch_size,
        processes=dist.world(),
        micro_batch=micro_batch,
        accumulation=accumulation,
        loss_batch=config.batch_size if task.couples_samples else 1,
        lr=lr,
        lr_rule=rule,
        warmup_steps=config.optim.warmup.steps(per_epoch=samples / config.batch_size, total=steps),
        engine=config.launch.engine,
        precision=precision,
        device=device,
        workers=workers,
        layouts=[list(each) for each in layouts],
        readers=readers,
        costs=costs(source, config.data, layouts, readers=readers) + _exact(task, accumulation),
        parameters={group.rule.name: group.size for group in groups} | others,
        memory=_state_memory(config, task) | {"activations (estimate)": micro_batch * each},
        start_lr=config.optim.start_lr,
        final_lr=config.optim.final_lr,
        lr_shape=config.optim.shape,
        milestones=[each.steps(per_epoch=samples / config.batch_size, total=steps) for each in config.optim.milestones],
        gamma=config.optim.gamma or 0.1,
        weight_decay=config.optim.weight_decay,
        final_weight_decay=config.optim.final_weight_decay,
        waits=waits,
    )


def _waits(rules: Sequence[Rule], begun: Mapping[str, int] | None, *, steps: int, per_epoch: float) -> dict[str, int]:
    """rule -> steps, of those that wait. Raises ConfigError for one that would do nothing else."""
    found = {}
    for rule in rules:
        asked = 0 if rule.waits is None else rule.waits.steps(per_epoch=per_epoch, total=steps)
        found[rule.name] = asked if begun is None else begun.get(rule.name, 0)
        if found[rule.name] >= steps:
            encoder = rule.name.startswith("encoder.")
            key, what = ("init.head_warmup", "the encoder") if encoder else (f"the wait of {rule.name}", "that")
            raise ConfigError(
                f"{key}={rule.waits}: {what} would wait for {found[rule.name]:,} steps and the run has {steps:,}, so it would"
                " never train; shorten it, or make the run longer"
            )
    return {name: number for name, number in found.items() if number}


def _refuse_flat_partitions(config: ProgramConfig) -> None:
    """Raise ConfigError for what needs to see a parameter whole."""
    by = config.optim.clip_by
    asked = {f"optim.clip_by={by}": by != "global", "optim.name=lars": config.optim.name == "lars"}
    if config.launch.engine.startswith("zero") and any(asked.values()):
        key = next(key for key, wanted in asked.items() if wanted)
        raise ConfigError(
            f"{key} with launch.engine={config.launch.engine}: it goes by norms of single parameters, and DeepSpeed cuts all of"
            " them, laid end to end, among the processes; take launch.engine=ddp"
        )


def _exact(task: Task, accumulation: int) -> list[str]:
    """What it costs that the whole batch meets in one loss although it comes in parts."""
    if not task.couples_samples or accumulation == 1:
        return []
    return [f"the loss sees the whole batch, so each of its {accumulation} parts goes forward twice: a third more work or less"]


def _state_memory(config: ProgramConfig, task: Task) -> dict[str, int]:
    sizes = [(p.numel(), p.requires_grad) for p in task.parameters()]
    return training_memory(
        trainable=sum(size for size, trains in sizes if trains),
        frozen=sum(size for size, trains in sizes if not trains) + _companions(task),
        engine=config.launch.engine,
        processes=dist.world(),
        moments=len(MOMENTS[config.optim.name]),
    )


def _companions(task: Task) -> int:
    """Parameters of networks that are used and neither trained nor saved."""
    return sum(p.numel() for network in task.companions() for p in network.parameters())


def _device_memory(device: str) -> float:
    """Bytes this process may count on; no bound where the GPU is elsewhere and only a plan is made."""
    if device == "cuda" and not torch.cuda.is_available():
        return math.inf
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([memory, *_container_limits()]) / max(1, local)


def _container_limits() -> list[int]:
    """Bytes that a container (control groups, version 2 and 1) may use, where it is limited."""
    found = []
    for path in CONTAINER:
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # none, or "max"
            continue
    return found

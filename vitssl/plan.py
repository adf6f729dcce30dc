"""The plan: every number that follows from the config, the data and the processes. Arithmetic over numbers handed in."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitssl.errors import ConfigError
from vitssl.schedule import Duration, Schedule


@dataclass(frozen=True)
class Plan:
    """Derived before step 1, printed, and saved as ``plan.json``."""

    steps: int
    epochs: float
    samples: int
    ignored: int  # files or members of the data that are no images
    batch_size: int
    processes: int
    micro_batch: int
    accumulation: int
    loss_batch: int  # samples that really meet in one loss
    lr: float
    lr_rule: str
    warmup_steps: int
    engine: str
    precision: str
    device: str
    workers: int
    layouts: list[list[int | None]]  # of each source: lanes, window, samples of a chunk
    readers: int = 1  # loader processes that each remote byte is read by
    costs: list[str] = field(default_factory=list)  # of reading this data, in words
    parameters: dict[str, int] = field(default_factory=dict)  # per rule, counted once each
    memory: dict[str, int] = field(default_factory=dict)  # bytes per process
    start_lr: float = 0.0
    final_lr: float = 0.0
    lr_shape: str = "cosine"
    milestones: list[int] = field(default_factory=list)  # steps at which the rate is multiplied by ``gamma``
    gamma: float = 0.1
    weight_decay: float = 0.0
    final_weight_decay: float | None = None  # None: it stays
    waits: dict[str, int] = field(default_factory=dict)  # rule -> first steps, in which its parameters stay

    @property
    def steps_per_epoch(self) -> float:
        return self.samples / self.batch_size

    def lr_schedule(self) -> Schedule:
        """The learning rate, per iteration."""
        ends = {"start": self.start_lr, "final": self.final_lr, "warmup": self.warmup_steps, "total": self.steps}
        return Schedule(self.lr, **ends, shape=self.lr_shape, milestones=tuple(self.milestones), gamma=self.gamma)

    def decay_schedule(self) -> Schedule:
        """The weight decay, per iteration: constant, or half a cosine without warm-up, as in DINO's ``cosine_scheduler``."""
        if self.final_weight_decay is None:
            return Schedule(peak=self.weight_decay, shape="constant")
        return Schedule(peak=self.weight_decay, final=self.final_weight_decay, total=self.steps)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def lines(self) -> list[tuple[str, str]]:
        """(what, value) for people."""
        factors = f"{self.processes} x {self.micro_batch} x {self.accumulation}"
        meet = f", {self.loss_batch} meet in one loss" if self.loss_batch > 1 else ""
        ignored = f" ({self.ignored:,} other files ignored)" if self.ignored else ""
        lanes = " + ".join(str(lanes) for lanes, *_ in self.layouts)
        twice = f", {self.readers} of which read each byte" if self.readers > 1 else ""
        batch = f"{self.batch_size} = {factors} (processes x micro-batch x accumulation){meet}"
        warmup = f"warm-up {self.warmup_steps:,} steps from {self.start_lr:g}"
        then = self._then if self.warmup_steps < self.steps else "longer than the run: this rate is never reached"
        return [
            ("data", f"{self.samples:,} images{ignored}, {lanes} lanes, {self.workers} loader processes each{twice}"),
            *(("note", cost) for cost in self.costs),
            ("length", f"{self.steps:,} steps = {self.epochs:,.4g} epochs"),
            ("batch", batch),
            ("lr", f"{self.lr:.4g} ({self.lr_rule}), {warmup}, {then}"),
            *([] if self.final_weight_decay is None else [("decay", self._decay)]),
            *(("wait", f"{steps:,} steps in which {who} keeps its weights") for who, steps in self._waiting.items()),
            ("engine", f"{self.engine}, {self.precision}, {self.device}"),
            *((f"rule {rule}", f"{count:,} parameters") for rule, count in self.parameters.items()),
            ("memory", ", ".join(f"{part} {_bytes(size)}" for part, size in self.memory.items()) + " per process"),
        ]

    @property
    def _then(self) -> str:
        if self.lr_shape == "multistep":
            places = [f"{step:,}{'' if step < self.steps else ' (beyond the run)'}" for step in self.milestones]
            return f"then x {self.gamma:g} at step {' and '.join(places)}"
        shape = {"cosine": "half cosine", "linear": "a line"}.get(self.lr_shape, self.lr_shape)
        return f"then {shape}" + (f" to {self.final_lr:g}" if self.final_lr else "")

    @property
    def _waiting(self) -> dict[str, int]:
        """Who waits, in words: the encoder's rules are one."""
        named = [("the encoder" if rule.startswith("encoder.") else rule, steps) for rule, steps in self.waits.items()]
        return dict(named)

    @property
    def _decay(self) -> str:
        return f"{self.weight_decay:g} to {self.final_weight_decay:g} along a half cosine"


def scaled_lr(base_lr: float, rule: str, batch_size: int) -> tuple[float, str]:
    """The absolute learning rate under a named rule, and the arithmetic in words."""
    if rule == "none":
        return base_lr, f"{base_lr:g}, not scaled"
    kind, reference = rule.split("/")
    share = batch_size / int(reference)
    lr = base_lr * (share if kind == "linear" else math.sqrt(share))
    arithmetic = f"{batch_size} / {reference}" if kind == "linear" else f"sqrt({batch_size} / {reference})"
    return lr, f"{base_lr:g} x {arithmetic}"


def split_batch(batch_size: int, processes: int, micro_batch: int | None, *, fits: int | None = None) -> tuple[int, int]:
    """(micro-batch, accumulation) with batch_size = processes x micro_batch x accumulation.

    Without a ``micro_batch`` the largest divisor that ``fits`` is taken. Raises ConfigError with the arithmetic.
    """
    if batch_size % processes:
        raise ConfigError(
            f"batch_size={batch_size} does not divide over {processes} processes ({batch_size} / {processes} ="
            f" {batch_size / processes:.2f}); take {_nearest_multiple(batch_size, processes)}"
        )
    share = batch_size // processes
    if micro_batch is None:
        limit = max(1, min(share, fits if fits is not None else share))
        micro_batch = max(size for size in range(1, limit + 1) if share % size == 0)
    if share % micro_batch:
        raise ConfigError(
            f"micro_batch={micro_batch} does not divide a process's share: batch_size {batch_size} / {processes} processes ="
            f" {share}, {share} / {micro_batch} = {share / micro_batch:.2f}; take {_nearest_divisor(share, micro_batch)}"
        )
    return micro_batch, share // micro_batch


def run_length(length: Duration, *, samples: int, batch_size: int) -> int:
    """Optimiser steps of the run. Raises ConfigError where that is none."""
    if length.unit == "%":
        raise ConfigError(
            f"length={length} is a share of the run, and that is what it is to say; write epochs (300ep) or steps"
        )
    steps = length.steps(per_epoch=samples / batch_size)
    if steps < 1:
        raise ConfigError(f"length={length} is {steps} steps of {batch_size} over {samples} images; nothing would be trained")
    return steps


def training_memory(*, trainable: int, frozen: int, engine: str, processes: int, moments: int = 2) -> dict[str, int]:
    """Bytes per process of fp32 parameters, gradients and the optimiser's moments under an engine (exact, without buffers).

    AdamW keeps two ``moments`` of each parameter, SGD one.
    """
    shard = processes if engine in ("zero1", "zero2") else 1
    gradient_shard = processes if engine == "zero2" else 1
    return {
        "parameters": 4 * (trainable + frozen) + (4 * trainable // shard if engine != "ddp" else 0),
        "gradients": 4 * trainable // gradient_shard,
        "optimiser": 4 * moments * trainable // shard,
    }


@dataclass(frozen=True)
class Stack:
    """``depth`` pre-norm blocks of width ``dim`` and ``heads`` heads that ``tokens`` tokens of one sample pass through."""

    tokens: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0

    def block(self, *, width: int, fused: bool) -> int:
        """Bytes that autograd saves in one block for one sample, ``width`` per element of a matrix product's input.

        Both residual inputs in fp32, both normalised inputs, q k v and the attention's output, and the MLP's hidden tensor
        before and after GELU; attention that is not ``fused`` also keeps its N x N weights.
        """
        weights = 0 if fused else self.heads * self.tokens**2 * width
        return round(self.tokens * self.dim * (2 * 4 + (6 + 2 * self.mlp_ratio) * width)) + weights


def activation_memory(stacks: Sequence[Stack], *, width: int, fused: bool, checkpointing: bool) -> int:
    """Bytes alive for one sample when its backward pass begins (an estimate).

    Blocks are counted exactly. The ends of a stack (embedding, positions, final norm, prediction, pixels, targets) are taken
    as one block more; measured, they are a quarter of one to one and a tenth, and more where patches have many more pixels
    than tokens have channels. With checkpointing a block keeps its input, and one of all blocks is alive at a time: that of all
    views which share a pass, as those may that go through blocks of the same size.
    """
    blocks = [stack.block(width=width, fused=fused) for stack in stacks]
    if not checkpointing:
        return sum((stack.depth + 1) * block for stack, block in zip(stacks, blocks))
    inputs = sum(stack.depth * stack.tokens * stack.dim * 4 for stack in stacks)
    alive: Counter[tuple[int, int, int]] = Counter()
    for stack, block in zip(stacks, blocks):
        alive[stack.dim, stack.depth, stack.heads] += block
    return inputs + sum(blocks) + max(alive.values(), default=0)


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _nearest_multiple(value: int, factor: int) -> str:
    below, above = value // factor * factor, -(-value // factor) * factor
    return f"{below} or {above}" if below else str(above)


def _nearest_divisor(value: int, wanted: int) -> str:
    divisors = [number for number in range(1, value + 1) if value % number == 0]
    near = sorted(divisors, key=lambda number: abs(number - wanted))[:2]
    return " or ".join(str(number) for number in sorted(near))

"""Processes: who we are, how many, and the few collectives the library needs. All of them work on one process alone."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from vitssl.errors import ConfigError

_PATIENCE = timedelta(days=7)  # where the first process works on alone, as when it trains heads, others wait for it


def rank() -> int:
    """This process's number, from the process group, else from the launcher's environment."""
    return td.get_rank() if _started() else int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes train together."""
    return td.get_world_size() if _started() else int(os.environ.get("WORLD_SIZE", 1))


def choose_device(asked: str) -> str:
    """``cuda`` or ``cpu``; ``cuda`` where it is asked for, also on a machine that only plans and has none."""
    return "cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu"


def device_here(asked: str, key: str) -> str:
    """The same on the machine that is to compute. Raises ConfigError, naming the ``key`` that asked, where it has no GPU."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key}cuda: torch sees no GPU here; take {key}auto, or mend the driver")
    return choose_device(asked)


def begin() -> None:
    """Join the processes that a launcher started, each with a GPU of its own, where no engine does it."""
    if "RANK" in os.environ and world() > 1 and not _started():
        td.init_process_group("gloo", timeout=_PATIENCE)
        if torch.cuda.is_available():  # "cuda" then means this one
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them; not differentiable."""
    if _started() and world() > 1:
        values = values.clone()
        td.all_reduce(values)
    return values


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them, with gradient.

    A run's loss is the mean of its processes' losses and DDP averages their gradients, so a collective in a loss passes back
    the *sum* of what all processes make of its result. Then N processes have the gradient of one with the joined batch, for
    a loss that each computes whole (from totals) as for one that each computes of its own rows (against all rows).
    """
    return _Total.apply(values) if _started() and world() > 1 else values


def all_rows(rows: Tensor) -> Tensor:
    """[B_p, ...] of every process -> [world x B_p, ...] in the order of the batch, with gradient (see :func:`total`).

    Row r of a batch is with process r % world, so the result does not depend on how many processes there are.
    """
    return _AllRows.apply(rows) if _started() and world() > 1 else rows


def gather_rows(rows: Tensor) -> Tensor:
    """[B_p, ...] of every process, of different lengths if need be -> [sum B_p, ...] in the order of the processes."""
    if not _started() or world() == 1:
        return rows
    counts = torch.zeros(world(), dtype=torch.int64, device=rows.device)
    counts[rank()] = len(rows)
    td.all_reduce(counts)
    longest = int(counts.max())
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world())]
    td.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist())])


class Agreement:
    """A vote a step that waits for no GPU: each process sends its flags and reads the sum of the step before.

    The votes travel over a gloo group of their own, so they neither wait for nor delay the gradients; every process reads
    the same answer in the same step, which is what lets all of them stop or save together.
    """

    def __init__(self) -> None:
        self._group = td.new_group(backend="gloo") if _started() and world() > 1 else None
        self._sent: tuple[Tensor, td.Work] | None = None

    def vote(self, *flags: bool) -> tuple[bool, ...]:
        """Send this step's flags; return, for each, whether any process raised it in the step before (alone: this step)."""
        if self._group is None:
            return flags
        answer = [False] * len(flags)
        if self._sent is not None:
            votes, work = self._sent
            work.wait()
            answer = [bool(count) for count in votes.tolist()]
        votes = torch.tensor(flags, dtype=torch.int32)
        self._sent = votes, td.all_reduce(votes, group=self._group, async_op=True)
        return tuple(answer)


def gather_lists(values: list) -> list:
    """The lists of all processes, joined in their order; on each of them."""
    if not _started() or world() == 1:
        return values
    found: list[list] = [[]] * world()
    td.all_gather_object(found, values)
    return [value for each in found for value in each]


def first_said(text: str | None) -> str | None:
    """Of the texts of all processes, that of the first which has one; on each of them."""
    return next((each for each in gather_lists([text]) if each), None)


def barrier() -> None:
    """Wait for every process."""
    if _started() and world() > 1:
        td.barrier()


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        td.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        td.all_reduce(gradient)
        return gradient


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(world())]
        td.all_gather(parts, rows)
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        td.all_reduce(gradient)
        return gradient[rank() :: world()]


def _started() -> bool:
    return td.is_available() and td.is_initialized()

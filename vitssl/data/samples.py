"""The samples of a source as the views ask for them, by their positions in the run; what cannot be used has a substitute."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from vitssl import draws
from vitssl.data import transforms
from vitssl.data.mixing import MixedOrder
from vitssl.data.order import Order
from vitssl.data.quarantine import Decided, Quarantine
from vitssl.data.repeats import RepeatedOrder
from vitssl.data.sources.balanced import BalancedOrder
from vitssl.data.sources.base import Ahead, Raw, Source
from vitssl.errors import DataError
from vitssl.task import Bad, Batch
from vitssl.views import View, purpose

_AUGMENT, _SUBSTITUTE = purpose("augment"), purpose("substitute")


class _Made(NamedTuple):
    """What stands at a position: views [H, W, C] in the order of the views asked for, or None where it is left out."""

    position: int
    key: str
    label: int | tuple[int, ...] | None
    views: tuple[transforms.Pixels, ...] | None
    bad: Bad | None = None


class Samples(Dataset):
    """The samples of a source in an order, as the views ask for them. Indexed by global positions of the run.

    ``labels=True`` asks for labels (DataError where the source has not all of them). ``augment`` is applied to every view.
    ``substitute``: an image that does not decode, or that ``quarantine`` holds, is replaced by another of the source, a
    function of (seed, position) and of the bytes alone; with ``leave_out`` its row is missing. The batch says so. ``memory``
    bytes may be held of a source that is read by chunk; after ``patience`` seconds decoding counts as hung; ``exif``,
    ``max_pixels`` and ``arrays`` as for :func:`transforms.decode`.
    """

    def __init__(
        self,
        source: Source,
        order: Order | MixedOrder | BalancedOrder | RepeatedOrder,
        views: Iterable[View],
        *,
        seed: int,
        channels: int = 3,
        labels: bool = False,
        augment: transforms.Augment | None = None,
        substitute: bool = False,
        leave_out: bool = False,
        quarantine: Quarantine = Quarantine(),  # noqa: B008 (it is frozen)
        memory: int = 1 << 30,
        patience: float = 120.0,
        exif: bool = False,
        max_pixels: int = transforms.MAX_PIXELS,
        arrays: bool = False,
    ) -> None:
        self.patience, self.pulse = patience, _no_pulse
        self._made: dict[int, _Made] = {}  # views of positions that are still to come, by repeats
        self.divided = 1, 1  # among processes, and among the workers of each
        self.decoding = {"exif": exif, "max_pixels": max_pixels, "arrays": arrays}
        self.memory, self._begun = memory, False
        assert not (substitute and leave_out), "one of the two"
        self.substitute, self.leave_out, self.quarantine = substitute, leave_out, quarantine
        self.source, self.order, self.views = source, order, tuple(views)
        self.seed, self.channels, self.labels, self.augment = seed, channels, labels, augment
        assert order.num_samples == source.num_samples, "the order was made for another source"
        if labels and not source.labels:
            missing = getattr(source, "num_unlabelled", source.num_samples)
            lacking = f"{missing:,} of {source.num_samples:,} samples have no label"
            raise DataError(f"{source.name}: {lacking}, and labels are needed here; name a labelled set")

    def among(self, world: int, parts: int) -> "Samples":
        """The same for one of ``parts`` workers of each of ``world`` processes: with its share of the memory."""
        mine, whole = copy.copy(self), self.order.shuffle and self.order.lanes > 1  # else all of them hold the same
        held = math.gcd(self.order.lanes, world * parts) if whole else world * parts
        mine.divided, mine.memory, mine._made = (world, parts), self.memory // held, {}
        return mine

    def without(self, positions: Iterable[int], reason: str) -> "Samples":
        """The same, passing over these positions. Raises DataError where nothing may stand in for them."""
        mine = copy.copy(self)
        ids = self.order.locate(positions := list(positions)).tolist()
        raws = self.source.read(ids)
        told = {position: f"{raw.where}: {reason}" for position, raw in zip(positions, raws, strict=True)}
        if not (self.substitute or self.leave_out):
            raise DataError(f"{next(iter(told.values()))}; take it out")
        known = self.quarantine.positions
        decided = {  # at a position that was passed over before, it is what stood in that is to blame
            position: before._replace(choice=before.choice + 1)
            if (before := self.quarantine.decided(position, sample))
            else Decided(told[position], 0, sample)
            for position, sample in zip(positions, ids, strict=True)
        }
        mine.quarantine = self.quarantine._replace(positions={**known, **decided})
        return mine

    def __len__(self) -> int:
        """Samples in one epoch."""
        return self.source.num_samples

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch of the samples at these [B] global positions. Raises DataError for one that cannot be read or decoded."""
        positions, coming, groups = [int(position) for position in positions], set(self._made), []
        for position in positions:
            if position not in coming:
                groups.append([position, *self._again(position)])
                coming.update(groups[-1])
        fresh = np.array([group[0] for group in groups], dtype=np.int64)
        ids = self.order.locate(fresh)
        raws = self.source.read(ids, self._ahead(fresh)) if groups else []
        targets = np.array([position for group in groups for position in group], dtype=np.int64)
        numbers = {view: transforms.draw_numbers(view, seed=self.seed, positions=targets).tolist() for view in self.views}
        seeds = {view: self._augment_seeds(view, targets) for view in self.views}
        drawn = {position: row for row, position in enumerate(targets.tolist())}

        def show(image: transforms.Pixels, position: int) -> tuple[transforms.Pixels, ...]:
            row = drawn[position]
            return tuple(
                transforms.show(image, view, numbers[view][row], augment=self.augment, augment_seed=seeds[view][row])
                for view in self.views
            )

        for raw, sample, group in zip(raws, ids.tolist(), groups, strict=True):
            self._make(raw, sample, group, show)
        made = [self._made.pop(position) for position in positions]
        used = [each for each in made if each.views is not None]
        return Batch(
            views={
                view: transforms.stacked([each.views[number] for each in used], view, self.channels)
                for number, view in enumerate(self.views)
            },
            positions=torch.tensor([each.position for each in used], dtype=torch.int64),
            labels=self._labels_of(used) if self.labels else None,
            keys=tuple(each.key for each in used),
            bad=tuple(each.bad for each in made if each.bad),
        )

    def _make(
        self, raw: Raw, sample: int, group: list[int], show: Callable[[transforms.Pixels, int], tuple[transforms.Pixels, ...]]
    ) -> None:
        """Decode a sample once and make the views of all positions of ``group``; where it cannot be used, those of others."""
        self.pulse(group[0])
        first = self.quarantine.decided(group[0], sample)
        image, reason = (None, first.reason) if first else self._decoded(raw)
        for position in group:
            decided = self.quarantine.decided(position, sample) or first
            if image is not None and not decided:
                self._made[position] = _Made(position, raw.key, raw.label, show(image, position))
                continue
            known = raw.key in self.quarantine.keys
            passing = decided is not None or (raw.passing and not known)
            bad = Bad(position, raw.key, "", decided.reason if decided else reason, known, passing, sample=sample)
            made = _Made(position, raw.key, raw.label, None, bad)
            if not self.leave_out:
                served, other, choice, lucky = self._another(position, bad.reason, first=decided.choice if decided else 0)
                bad = bad._replace(served=served.key, passing=passing or lucky, choice=choice)
                made = made._replace(label=served.label, views=show(other, position), bad=bad)
            self._made[position] = made
        self.pulse(None)

    def _labels_of(self, used: Sequence[_Made]) -> torch.Tensor:
        """[B] int64, or [B, classes] bool where samples have several."""
        if (num_classes := getattr(self.source, "num_classes", None)) is None:
            return torch.tensor([each.label for each in used], dtype=torch.int64)
        hot = torch.zeros(len(used), num_classes, dtype=torch.bool)
        for row, each in zip(hot, used, strict=True):
            row[list(each.label)] = True
        return hot

    def _again(self, position: int) -> list[int]:
        """Later positions of the same sample that this process will be asked for."""
        later = self.order.later(position) if isinstance(self.order, RepeatedOrder) else ()
        world, parts = self.divided
        return [each for each in later if (each - position) % world == 0 and (each - position) // world % parts == 0]

    def _ahead(self, positions: np.ndarray) -> Ahead | None:
        """What stands a reach further on, in the lanes of these positions; the first time also all that lies between."""
        if not self.source.by_chunk:
            return None
        if not self.order.shuffle:  # what comes next is another process's
            return Ahead(np.empty(0, dtype=np.int64), self.memory)
        reach, step = self.order.reach, self.order.lanes
        later = positions + reach
        if not self._begun:
            self._begun = True
            between = np.add.outer(np.arange(step, reach + step, step), positions).ravel()
            later = between if step > 1 else np.arange(positions.min(), positions.max() + reach + 1)
        return Ahead(self.order.locate(later), self.memory)

    def _decoded(self, raw: Raw) -> tuple[transforms.Pixels | None, str]:
        """(image, "") or (None, why not)."""
        if self.labels and raw.label is None and not raw.problem:
            raise DataError(f"{raw.where}: has no label, though its index says that all have; index it again")
        if raw.key in self.quarantine.keys:
            return None, f"{raw.where}: named in the quarantine file"
        try:
            return transforms.decode(raw, self.channels, **self.decoding), ""
        except DataError as error:
            if not (self.substitute or self.leave_out):
                raise
            return None, str(error)

    def _another(self, position: int, reason: str, *, first: int) -> tuple[Raw, transforms.Pixels, int, bool]:
        """The first that decodes of ten samples drawn for a position, beginning at number ``first``; which it was, and whether
        the network had a say in that. Raises DataError where none does.
        """
        drawn = draws.hashed(self.seed, _SUBSTITUTE, torch.tensor([position]), 10)[0] & 0x7FFFFFFFFFFFFFFF
        ids, lucky = (drawn % len(self)).tolist(), False
        for choice in range(first, len(ids)):
            self.pulse(None)  # waiting for bytes is not decoding
            (raw,) = self.source.read(ids[choice : choice + 1])
            self.pulse(position)
            image, _ = self._decoded(raw)
            if image is not None:
                return raw, image, choice, lucky
            lucky = lucky or raw.passing
        raise DataError(f"{reason}; nor do ten others of {self.source.name}: look at the data")

    def _augment_seeds(self, view: View, positions: np.ndarray) -> list[int]:
        if self.augment is None:
            return [0] * len(positions)
        hashes = draws.hashed(self.seed, draws.fold(_AUGMENT, view.purpose), torch.from_numpy(positions), 1)
        return (hashes[:, 0] & 0x7FFFFFFFFFFFFFFF).tolist()


def _no_pulse(position: int | None) -> None:
    """Nobody watches a process that decodes its own images."""

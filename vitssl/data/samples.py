"""The samples of a source as the views ask for them, by their positions in the run; what cannot be used has a substitute."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from vitssl import draws
from vitssl.data import transforms
from vitssl.data.order import Order
from vitssl.data.quarantine import Quarantine
from vitssl.data.sources.base import Ahead, Raw, Source
from vitssl.errors import DataError
from vitssl.task import Bad, Batch
from vitssl.views import View, purpose

_AUGMENT, _SUBSTITUTE = purpose("augment"), purpose("substitute")


class Samples(Dataset):
    """The samples of a source in an order, as the views ask for them. Indexed by global positions of the run.

    ``labels=True`` asks for labels (DataError where the source has not all of them). ``augment`` is applied to every view.
    ``substitute``: an image that does not decode, or that ``quarantine`` holds, is replaced by another of the source, a
    function of (seed, position) and of the bytes alone; with ``leave_out`` its row is missing. The batch says so. ``memory``
    bytes may be held of a source that is read by chunk.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
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
    ) -> None:
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

    def __len__(self) -> int:
        """Samples in one epoch."""
        return self.source.num_samples

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch of the samples at these [B] global positions. Raises DataError for one that cannot be read or decoded."""
        positions = np.array(positions, dtype=np.int64)
        raws = self.source.read(self.order.locate(positions), self._ahead(positions))
        numbers = {view: transforms.draw_numbers(view, seed=self.seed, positions=positions).tolist() for view in self.views}
        seeds = {view: self._augment_seeds(view, positions) for view in self.views}
        pixels = {view: np.empty((len(raws), *view.size, self.channels), dtype=np.uint8) for view in self.views}
        keys, bad, used = [raw.key for raw in raws], [], []
        for row, raw in enumerate(raws):
            image, reason = self._decoded(raw)
            decided = self.quarantine.positions.get(position := int(positions[row]))
            if decided:
                image, reason = None, decided.reason
            if image is None:
                known, choice, served = raw.key in self.quarantine.keys, 0, ""
                passing = decided is not None or (raw.passing and not known)
                if not self.leave_out:
                    raws[row], image, choice, lucky = self._another(position, reason, first=decided.choice if decided else 0)
                    passing, served = passing or lucky, raws[row].key
                bad.append(Bad(position, raw.key, served, reason, known, passing, choice))
            if image is not None:
                for view in self.views:
                    pixels[view][len(used)] = transforms.show(
                        image, view, numbers[view][row], augment=self.augment, augment_seed=seeds[view][row]
                    )
                used.append(row)
        images = {view: torch.from_numpy(found[: len(used)]).permute(0, 3, 1, 2) for view, found in pixels.items()}
        return Batch(
            views={view: found.contiguous() for view, found in images.items()},
            positions=torch.from_numpy(positions[used]),
            labels=torch.tensor([raws[row].label for row in used], dtype=torch.int64) if self.labels else None,
            keys=tuple(keys[row] for row in used),
            bad=tuple(bad),
        )

    def _ahead(self, positions: np.ndarray) -> Ahead | None:
        """What stands a reach further on, in the lanes of these positions; the first time also all that lies between."""
        if not self.source.by_chunk:
            return None
        reach, step = self.order.reach, self.order.lanes
        later = positions + reach
        if not self._begun:
            self._begun = True
            later = np.add.outer(np.arange(step, reach + step, step), positions).ravel()
        return Ahead(self.order.locate(later), self.memory)

    def _decoded(self, raw: Raw) -> tuple[transforms.Pixels | None, str]:
        """(image, "") or (None, why not)."""
        if raw.key in self.quarantine.keys:
            return None, f"{raw.where}: named in the quarantine file"
        try:
            return transforms.decode(raw, self.channels), ""
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
            (raw,) = self.source.read(ids[choice : choice + 1])
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

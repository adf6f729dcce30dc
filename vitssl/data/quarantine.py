"""Images that cannot be used: how many are borne, how they are written down, and how a later run is told to pass them over."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from vitssl import dist
from vitssl.errors import ConfigError, DataError
from vitssl.task import Batch

FILE = "quarantine.jsonl"
FIRST = 1000  # images: a fraction of fewer is no measure


def bearable(batches: Iterable[Batch], *, max_fraction: float, seen: int = 0, bad: int = 0) -> Iterator[Batch]:
    """The batches, as long as no more than ``max_fraction`` of the images (and of the first 1000) had to be replaced.

    ``seen`` and ``bad`` images of the run before it was continued count, as many of each process; what a quarantine file names
    does not. Raises DataError with the image that was one too many, and the counts.
    """
    world = dist.world()
    for batch in batches:
        seen += world * len(batch)
        found = [each for each in batch.bad if not each.known]
        bad += world * len(found)
        if found and bad > max_fraction * max(seen, FIRST):
            counts = (
                f"; {bad:,} of {seen:,} images could not be used, data.max_bad_fraction={max_fraction:g} bears no more ({FILE})"
            )
            raise DataError(found[-1].reason + counts)
        yield batch


def count_bad(folder: Path) -> int:
    """How many images of the run in a folder had to be replaced, those not counted that a file had named."""
    return sum(not row["known"] for row in _rows(folder))


class Decided(NamedTuple):
    """What the network or the moment once decided of a sample: the reason, which of those drawn stood in, and its id."""

    reason: str
    choice: int
    sample: int


class Quarantine(NamedTuple):
    """What is to be passed over: samples by their ``keys``, for what their bytes are, and ``positions`` of a run, for what the
    network or the moment decided there: a replay follows it."""

    keys: frozenset[str] = frozenset()
    positions: Mapping[int, Decided] = MappingProxyType({})

    def decided(self, position: int, sample: int) -> Decided | None:
        """What was decided at a position, if the same sample stood there: a run of another seed has others."""
        found = self.positions.get(position)
        return found if found is not None and found.sample == sample else None


def passing(folder: Path) -> dict[int, Decided]:
    """The positions of the run in a folder at which the network or the moment decided."""
    return _decided(_rows(folder))


def _rows(folder: Path) -> list[dict]:
    """The rows of a run's file, up to one that a killed process left half-written."""
    rows, path = [], folder / FILE
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _decided(rows: list[dict]) -> dict[int, Decided]:
    return {row["position"]: Decided(row["reason"], row["choice"], row["sample"]) for row in rows if row.get("passing")}


def read_quarantine(path: Path | None) -> Quarantine:
    """What a quarantine file names, nothing without a file. Raises ConfigError for one that cannot be read."""
    if path is None:
        return Quarantine()
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        keys = frozenset(row["key"] for row in rows if not row.get("passing"))
        return Quarantine(keys, _decided(rows))
    except OSError as error:
        raise ConfigError(f"data.quarantine={path}: cannot be read ({error.strerror or error}); correct the path") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"data.quarantine={path}: is no {FILE} of a run; every line names a key, as in it") from None

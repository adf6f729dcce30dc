"""The labels of a shard's samples where each may have several: read from its headers once, and kept beside its index.

A sidecar ``SHARD.labels`` (or in the cache) is one JSON line with the shard's identity, then the numbers of labels of all
samples, then the labels. The index itself knows one label a sample and stays as it is: data of single labels pays nothing.
"""

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitssl.data import tarscan
from vitssl.data.index import cached, replace_file
from vitssl.errors import DataError

VERSION, SUFFIX = 1, ".labels"


def shard_labels(shard: str, identity: str, num_samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(how many labels each sample has [n], all of them in a row) of a local shard whose index has this identity.

    Raises DataError for a sample without any list of labels; an empty list is one.
    """
    places = Path(f"{shard}{SUFFIX}"), cached(shard, SUFFIX)
    for path in places:
        if (found := _read(path, identity, num_samples)) is not None:
            return found
    sets = []
    for sample in tarscan.samples(shard)[0]:
        if sample.labels is None:
            raise DataError(
                f"{shard}: sample {sample.key!r} has no list of labels; write a .cls of numbers with spaces or commas between"
                ' them, or "labels": [...] into its .json'
            )
        sets.append(sample.labels)
    counts = np.array([len(each) for each in sets], dtype=np.int64)
    labels = np.array([label for each in sets for label in each], dtype=np.int64)
    if len(counts) != num_samples:
        raise DataError(f"{shard}: changed since it was indexed; leave the shards alone and start again")
    head = {"format": "vitssl-labels", "version": VERSION, "identity": identity, "samples": num_samples, "labels": len(labels)}
    for path in places:
        try:
            replace_file(path, json.dumps(head).encode() + b"\n" + counts.tobytes() + labels.tobytes())
        except OSError:
            continue  # not writable, or full: the next place
        break
    return counts, labels


def _read(path: Path, identity: str, num_samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """What a sidecar holds, or None where it is missing, damaged or of other bytes."""
    try:
        with open(path, "rb") as file:
            line = file.readline(4096)
            head = json.loads(line)
            known = {"format": "vitssl-labels", "version": VERSION, "identity": identity, "samples": num_samples}
            if {name: head.get(name) for name in known} != known:
                return None
            if os.fstat(file.fileno()).st_size != len(line) + 8 * (num_samples + head["labels"]):
                return None
            numbers = np.frombuffer(file.read(), dtype=np.int64)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    counts, labels = numbers[:num_samples], numbers[num_samples:]
    whole = counts.min(initial=0) >= 0 and counts.sum() == len(labels) and labels.min(initial=0) >= 0
    return (counts, labels) if whole else None

"""Small real tars and images for the tests of the data engine."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITSSL_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """``encoded(number)``: the bytes of a small picture that no other number has."""

    def encode(number: int, *, size: tuple[int, int] = (12, 10), format: str = "PNG", mode: str = "RGB") -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, format=format)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., str]:
    """``write_tar(path, {name: bytes})``: a tar with these members, in order."""

    def write(path: Path, members: Mapping[str, bytes]) -> str:
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return str(path)

    return write


@pytest.fixture(scope="session")
def label_of() -> Callable[[int], int]:
    """The label of a key of ``shards``: classes 0 to 3 with 10, 20, 30 and 40 samples, mixed."""
    return lambda key: (0, 1, 1, 2, 2, 2, 3, 3, 3, 3)[key * 7 % 10]


@pytest.fixture
def shards(tmp_path: Path, write_tar: Callable, encoded: Callable, label_of: Callable) -> Path:
    """A folder of three labelled shards with 40 + 23 + 37 = 100 samples of 4 unequal classes, and the keys 0000 to 0099."""
    folder, number = tmp_path / "shards", 0
    folder.mkdir()
    for shard, count in enumerate((40, 23, 37)):
        members = {}
        for key in range(number, number + count):
            members[f"{key:04d}.png"] = encoded(key)
            members[f"{key:04d}.cls"] = str(label_of(key)).encode()
        write_tar(folder / f"train-{shard:03d}.tar", members)
        number += count
    return folder

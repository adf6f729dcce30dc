"""Small real tars and images for the tests of the data engine."""

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webserver import WebServer, serving

from vitssl.data import remote
from vitssl.data.sources import Source, open_source


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


@pytest.fixture
def photos(tmp_path: Path, encoded: Callable) -> Path:
    """A nested folder of 6 images in two classes, a hidden one and two other files."""
    files = {"cat/1.png": 1, "cat/deep/2.jpg": 2, "dog/3.PNG": 3, "dog/10.webp": 4, "dog/9.bmp": 5, "dog/z.tiff": 6}
    for name, number in files.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, format={"jpg": "JPEG"}.get(name[-3:], "PNG")))
    for other in ("notes.txt", "dog/README", ".thumbs.png", ".git/x.png"):
        path = tmp_path / "photos" / other
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "photos"


@pytest.fixture
def classes(tmp_path: Path, encoded: Callable) -> Callable[..., Source]:
    """``classes(*names)``: a folder of two images in each class."""

    def make(*names: str) -> Source:
        root = tmp_path / "-".join(names)
        for number, name in enumerate(names):
            (root / name).mkdir(parents=True)
            for copy in range(2):
                (root / name / f"{copy}.png").write_bytes(encoded(2 * number + copy))
        return open_source(root)

    return make


@pytest.fixture
def listing(photos: Path) -> Callable[..., str]:
    """``listing(text, name)``: a list file beside the photos, by default of all six with the numbers 0 and 1 as labels."""
    everything = "path,label\ncat/1.png,0\ncat/deep/2.jpg,0\ndog/10.webp,1\ndog/3.PNG,1\ndog/9.bmp,1\ndog/z.tiff,1\n"

    def write(text: str | bytes = everything, name: str = "list.csv") -> str:
        (photos / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(photos / name)

    return write


@pytest.fixture(scope="session")
def rows(encoded: Callable, label_of: Callable) -> Callable[..., Any]:
    """``rows(num)``: a Hugging Face data set of ``num`` pictures, labels of four named classes, and a text."""

    def make(num: int = 40, *, first: int = 0) -> Any:
        import datasets

        numbers = range(first, first + num)
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd")), "text": datasets.Value("string")}
        columns = {
            "image": [{"bytes": encoded(number), "path": None} for number in numbers],
            "label": [label_of(number) for number in numbers],
            "text": [str(number) for number in numbers],
        }
        return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))

    return make


@pytest.fixture
def saved(rows: Callable, tmp_path: Path) -> Callable[..., str]:
    """``saved(data)``: a folder it was saved to, by default forty rows."""

    def save(data: Any = None, name: str = "saved") -> str:
        (rows() if data is None else data).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def parquet(rows: Callable, tmp_path: Path) -> Callable[..., str]:
    """``parquet(name, num=24, first=0)``: a parquet file of these rows, ten in a row group."""

    def write(name: str = "p.parquet", *, num: int = 24, first: int = 0) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        rows(num, first=first).to_parquet(tmp_path / name, batch_size=10)
        return str(tmp_path / name)

    return write


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """What one test learned of a server is not another's, which may have its port."""
    yield
    remote._whole.clear()


@pytest.fixture
def server(shards: Path) -> Iterator[WebServer]:
    with serving(shards) as server:
        yield server

"""The demo set: the same bytes every time, whole or not there, and no class that colour or raw pixels could tell."""

import collections
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitssl.data import demo
from vitssl.errors import DataError

SMALL = {"num_train": 60, "num_test": 24, "processes": 0}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 + 24 images in shards of 25, drawn in pieces of 10."""
    folder = tmp_path_factory.mktemp("demo") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SHARD_SAMPLES", 25)
        patch.setattr(demo, "PIECE_SAMPLES", 10)
        demo.render(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """600 images [600, 32, 32, 3] in [0, 1] and their labels."""
    images, labels, _ = zip(*(demo.draw(index) for index in range(600)))
    return np.stack(images) / 255.0, np.array(labels)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(folder: Path, split: str) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            found.update({member.name: tar.extractfile(member).read() for member in tar})
    return found


def nearest_neighbour_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Leave-one-out, squared distance."""
    squares = (features**2).sum(1)
    distances = squares[:, None] + squares - 2.0 * features @ features.T
    np.fill_diagonal(distances, np.inf)
    return float((labels[distances.argmin(1)] == labels).mean())


def test_draw_is_a_function_of_seed_and_index() -> None:
    image, label, factors = demo.draw(7, seed=3)
    again = demo.draw(7, seed=3)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert (image == again[0]).all() and (label, factors) == again[1:]
    assert (image != demo.draw(7, seed=4)[0]).any() and (image != demo.draw(8, seed=3)[0]).any()
    json.dumps(factors)


def test_other_sizes_show_the_same_scene() -> None:
    image, label, factors = demo.draw(5, size=64)
    small, small_label, small_factors = demo.draw(5, size=32)
    assert image.shape == (64, 64, 3) and (label, factors) == (small_label, small_factors)
    assert np.abs(image.reshape(32, 2, 32, 2, 3).mean((1, 3)) - small).mean() < 8.0


def test_the_scene_does_not_know_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [demo.draw(index)[2] for index in range(24)]
    outline = demo._outline
    monkeypatch.setattr(demo, "_outline", lambda name, rng: outline("ring", rng))
    assert [demo.draw(index)[2] for index in range(24)] == before


def test_every_block_holds_every_class() -> None:
    assert len(demo.CLASSES) == len(set(demo.CLASSES)) >= 10
    for start in (0, 120, demo.TEST_START):
        assert sorted(demo.draw(start + k)[1] for k in range(len(demo.CLASSES))) == list(range(len(demo.CLASSES)))


def test_colour_does_not_tell_the_class(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = drawn
    chance, noise = 1 / len(demo.CLASSES), (len(labels) * len(demo.CLASSES)) ** -0.5
    assert nearest_neighbour_accuracy(images.mean((1, 2)), labels) < chance + 4 * noise
    levels = (images * 3.999).astype(int) @ np.array([16, 4, 1])
    histograms = np.stack([np.bincount(level.ravel(), minlength=64) for level in levels]) ** 0.5
    assert nearest_neighbour_accuracy(histograms, labels) < chance + 4 * noise


def test_raw_pixels_hardly_tell_the_class(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = drawn
    assert nearest_neighbour_accuracy(images.reshape(len(images), -1), labels) < 0.25


def test_shards_hold_every_sample_once(small: Path) -> None:
    assert sorted(contents(small)) == [
        "about.json", "test-000000.tar", "train-000000.tar", "train-000001.tar", "train-000002.tar",
    ]  # fmt: skip
    for split, num, start in (("train", 60, 0), ("test", 24, demo.TEST_START)):
        found = members(small, split)
        assert set(found) == {f"{split}-{k:08d}.{kind}" for k in range(num) for kind in ("jpg", "cls")}
        for k in range(num):
            pixels, label, _ = demo.draw(start + k)
            assert found[f"{split}-{k:08d}.cls"] == str(label).encode()
            image = Image.open(io.BytesIO(found[f"{split}-{k:08d}.jpg"]))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
            assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 8
        counts = collections.Counter(found[f"{split}-{k:08d}.cls"] for k in range(num))
        assert set(counts.values()) == {num // len(demo.CLASSES)}


def test_about_says_what_was_drawn(small: Path) -> None:
    assert json.loads((small / "about.json").read_text()) == {
        "classes": list(demo.CLASSES), "num_train": 60, "num_test": 24, "size": 32, "seed": 0, "version": demo.VERSION,
    }  # fmt: skip


def test_processes_write_the_same_bytes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHARD_SAMPLES", 25)
    reports: list[tuple[int, int]] = []
    demo.render(tmp_path / "set", **{**SMALL, "processes": 2}, progress=lambda done, total: reports.append((done, total)))
    assert contents(tmp_path / "set") == contents(small)
    assert reports[-1] == (84, 84) and reports == sorted(reports)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_another_seed_differs(small: Path, tmp_path: Path) -> None:
    demo.render(tmp_path / "set", **{**SMALL, "num_train": 12}, seed=1)
    assert members(tmp_path / "set", "test").keys() == members(small, "test").keys()
    assert members(tmp_path / "set", "test") != members(small, "test")


def test_a_whole_set_is_left_alone(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "draw", None)
    before = (small / "about.json").stat().st_mtime_ns
    demo.render(small, **SMALL)
    assert (small / "about.json").stat().st_mtime_ns == before


def test_an_interrupted_render_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.render(tmp_path / "set", **SMALL, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_the_slower_of_two_renders_gives_way(tmp_path: Path) -> None:
    def overtake(done: int, total: int) -> None:
        if done == total:
            demo.render(tmp_path / "set", **SMALL)

    demo.render(tmp_path / "set", **SMALL, progress=overtake)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_that_holds_something_else_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"another demo set \(seed=0 and not 2, num_train=60 and not 61\)"):
        demo.render(small, **{**SMALL, "num_train": 61}, seed=2)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(DataError, match=r"no demo set that can be read \(about.json\): delete it or choose another"):
        demo.render(tmp_path, **SMALL)


def test_drawing_needs_no_torch() -> None:
    program = "import sys; from vitssl.data.demo import draw; draw(0); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)

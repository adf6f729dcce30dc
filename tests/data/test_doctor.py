"""The doctor's numbers beside slow ones, and what it says of damage and copies."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitssl.data.doctor import examine
from vitssl.data.sources import open_source
from vitssl.data.transforms import decode
from vitssl.inspect.doctor import in_words, page


@pytest.mark.parametrize("processes", [1, 2])
def test_numbers_are_those_of_every_pixel(shards: Path, processes: int) -> None:
    source, told = open_source(shards), []
    found = examine(source, thumbs=5, processes=processes, progress=lambda *numbers: told.append(numbers))
    pixels = np.concatenate([decode(raw).reshape(-1, 3) for raw in source.read(range(100))]) / 255
    assert found.samples == 100 and found.pixels == 100 * 12 * 10 and told[-1] == (100, 100)
    assert np.allclose(found.mean, pixels.mean(axis=0), atol=1e-12) and np.allclose(found.std, pixels.std(axis=0), atol=1e-9)
    assert found.formats == {"PNG": 100} and found.modes == {"RGB": 100} and found.labels == {0: 10, 1: 20, 2: 30, 3: 40}
    assert {size[:2] for size in found.sizes} == {(12, 10)} and not found.duplicates and not found.damaged
    assert [number for number, _ in found.thumbs] == [0, 24, 49, 74, 99]
    words = dict(in_words(found))
    assert words["images"] == "100, of which 0 are damaged" and words["labels"] == "4 classes of 10 to 40 images"
    assert words["statistics"].startswith(f"data.mean=[{found.mean[0]:.3f}, ") and words["width"].startswith(
        "12 px (5 % below 12"
    )


def test_damage_and_copies_are_named(classes: Callable, tmp_path: Path) -> None:
    source = classes("<a>", "b")
    folder = Path(source.name)
    (folder / "b/copy.png").write_bytes((folder / "<a>/0.png").read_bytes())
    (folder / "b/half.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    source = open_source(folder)
    found = examine(source)
    assert found.duplicates == [["<a>/0.png", "b/copy.png"]]
    ((key, reason),) = found.damaged
    assert key == "b/half.jpg" and "half.jpg: " in reason
    words = dict(in_words(found))
    assert words["images"] == "6, of which 1 are damaged" and reason in words["damaged"]
    assert words["twice"] == "1 images are exact copies of others (<a>/0.png = b/copy.png)"
    text = page("my & photos", found, source.classes)
    assert "<h1>my &amp; photos</h1>" in text and "<td>&lt;a&gt;<td>" in text and "<a>/" not in text
    assert "data:image/png;base64," in text and "b/half.jpg" in text and json.dumps(text)

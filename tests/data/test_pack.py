"""Packing: every sample once, balanced, the same bytes again, interrupted or not; what is twice or bad is told."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitssl.data import pack as packing
from vitssl.data.pack import PackConfig, pack
from vitssl.data.sources import Source, open_source
from vitssl.errors import ConfigError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 smooth JPEG of 60 x 40 in two classes: one is there twice, one nearly, one is damaged, one is small."""
    for number in range(24):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((60, 40), Image.Resampling.BICUBIC)
        if number == 7:
            picture = picture.resize((20, 14))
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)
    folder = tmp_path / "photos"
    (folder / "b/copy.jpg").write_bytes((folder / "a/04.jpg").read_bytes())
    Image.open(folder / "a/08.jpg").save(folder / "b/alike.jpg", quality=70)
    (folder / "b/11.jpg").write_bytes((folder / "b/11.jpg").read_bytes()[:300])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json", ".jsonl")}


def everything(source: Source) -> list[tuple[bytes, int | None]]:
    return sorted((raw.image, raw.label) for raw in source.read(range(source.num_samples)))


@pytest.mark.parametrize("processes", [1, 3])
def test_every_sample_once_in_balanced_shards(photos: Path, tmp_path: Path, processes: int) -> None:
    source, told = open_source(photos), []
    config = PackConfig(shard_bytes=9000)
    found = pack(source, tmp_path / "out", config, processes=processes, progress=lambda *numbers: told.append(numbers))
    packed = open_source(tmp_path / "out", split="train")
    assert found == {"duplicates": 1, "alike": 0, "bad": 0, "samples": 26, "shards": len(packed.manifest.shards)}
    sizes = packed.manifest.rows["samples"]
    assert len(sizes) > 3 and sizes.max() - sizes.min() <= 1
    assert told == [(done, len(sizes)) for done in range(len(sizes) + 1)]
    assert everything(packed) == everything(source) and packed.classes == ("a", "b")
    assert packed.label_array().tolist() != sorted(packed.label_array().tolist())  # shuffled
    rows = [json.loads(line) for line in (tmp_path / "out/train.duplicates.jsonl").read_text().splitlines()]
    assert rows == [{"kind": "exact", "keys": ["a/04.jpg", "b/copy.jpg"]}]
    assert not list((tmp_path / "out").glob(".*"))
    before = contents(tmp_path / "out")
    assert pack(source, tmp_path / "out", config) == found and contents(tmp_path / "out") == before
    pack(source, tmp_path / "again", config)
    assert contents(tmp_path / "again") == before


def test_interrupted_it_goes_on_to_the_same_bytes(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config, real = open_source(photos), PackConfig(shard_bytes=9000), packing.write_shard
    pack(source, tmp_path / "whole", config)
    written: list[str] = []

    def dies(path: Path, samples: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, samples)

    monkeypatch.setattr(packing, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", config)
    monkeypatch.setattr(packing, "write_shard", lambda path, samples: (written.append(path.name), real(path, samples)))
    pack(source, tmp_path / "out", config)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and len(written) == len(set(written))


def test_resized_and_looked_at(photos: Path, tmp_path: Path) -> None:
    config = PackConfig(name="small", short_side=20, max_side=28, shuffle=False, perceptual=True)
    found = pack(open_source(photos), tmp_path / "out", config)
    assert found == {"duplicates": 1, "alike": 2, "bad": 1, "samples": 25, "shards": 1}
    packed = open_source(tmp_path / "out", split="small")
    raws = packed.read(range(25))
    sizes = [Image.open(io.BytesIO(raw.image)).size for raw in raws]
    assert sizes.count((28, 19)) == 24 and sizes.count((20, 14)) == 1  # the longer bound holds; what is small stays
    assert [raw.label for raw in raws] == sorted(raw.label for raw in raws)
    assert (photos / "b/07.jpg").read_bytes() in [raw.image for raw in raws]
    theirs = np.asarray(Image.open(photos / "a/00.jpg").resize((28, 19), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(Image.open(io.BytesIO(raws[0].image))).astype(int) - theirs).mean() < 6
    (bad,) = [json.loads(line) for line in (tmp_path / "out/small.bad.jsonl").read_text().splitlines()]
    assert bad["key"] == "b/11.jpg" and "does not decode" in bad["reason"]
    rows = [json.loads(line) for line in (tmp_path / "out/small.duplicates.jsonl").read_text().splitlines()]
    assert [row["keys"] for row in rows if row["kind"] == "alike"] == [["a/04.jpg", "b/copy.jpg"], ["a/08.jpg", "b/alike.jpg"]]


def test_what_is_already_there_is_not_mixed_up(photos: Path, tmp_path: Path, classes: Callable) -> None:
    source = open_source(photos)
    pack(source, tmp_path / "out", PackConfig())
    with pytest.raises(ConfigError, match=r"train.pack.json is of another pack \(seed differ\); give another folder or --name"):
        pack(source, tmp_path / "out", PackConfig(seed=1))
    with pytest.raises(ConfigError, match=r"about.json names other classes than .*; pack it into another folder"):
        pack(classes("a", "c"), tmp_path / "out", PackConfig(name="test"))
    assert pack(classes("a", "b"), tmp_path / "out", PackConfig(name="test"))["samples"] == 4
    (tmp_path / "out/old-000000.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds old-\*.tar that no pack wrote"):
        pack(source, tmp_path / "out", PackConfig(name="old"))


def test_alike_finds_every_pair_of_few_bits() -> None:
    """Beside a slow oracle."""
    chance = np.random.default_rng(0)
    values = chance.integers(0, 2**63, 60, dtype=np.uint64)
    for number in range(30):  # pairs of 0 to 5 differing bits
        flips = chance.choice(64, number % 6, replace=False)
        values[30 + number] = values[number] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    hashes = [(f"{number:02}", f"{value:016x}") for number, value in enumerate(values.tolist())]
    expected = [
        (one, other)
        for place, (one, bits) in enumerate(hashes)
        for other, others in hashes[place + 1 :]
        if (int(bits, 16) ^ int(others, 16)).bit_count() <= 3
    ]
    assert list(packing._alike(hashes)) == expected and len(expected) == 20


def test_what_has_no_telling_name_is_packed_by_what_it_is(photos: Path, tmp_path: Path, encoded: Callable) -> None:
    (photos / "first").write_bytes((photos / "a/04.jpg").read_bytes())
    (photos / "second").write_bytes(encoded(1))
    (photos / "third").write_bytes(encoded(2, format="WEBP"))
    (photos / "fourth").write_bytes(b"nothing")
    (photos / "list.txt").write_text("first\nsecond\nthird\nfourth\n")
    source = open_source(photos / "list.txt")
    assert pack(source, tmp_path / "out", PackConfig(shuffle=False))["bad"] == 1
    raws = open_source(tmp_path / "out").read(range(3))
    assert [raw.where.split(" (byte")[0].rpartition(".")[2] for raw in raws] == ["jpg", "png", "webp"]
    (row,) = (tmp_path / "out/train.bad.jsonl").read_text().splitlines()
    assert json.loads(row)["reason"] == f"{photos}/fourth: is no image of a known format; replace it or take it out"

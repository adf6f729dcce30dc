"""``python -m finetune.predict``: the same answers as the run's own evaluation, from any images."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.predict import main
from vitssl.data.sources import open_source
from vitssl.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def tuned(finetune: Callable, tmp_path_factory: pytest.TempPathFactory):
    return finetune(tmp_path_factory.mktemp("tuned") / "run", "test.crop_pct=0.8").ok()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_the_evaluations(tuned, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tuned.folder), f"{data}/test-0.tar", "--jsonl", f"{tmp_path}/rows.jsonl", "--top", "2"]) == 0
    found, source = rows(tmp_path / "rows.jsonl"), open_source(data, split="test")
    raws = source.read(range(16))
    assert [row["image"] for row in found] == [raw.key for raw in raws]
    hits = sum(row["top"][0]["class"] == str(raw.label) for row, raw in zip(found, raws, strict=True))
    facts = json.loads((tuned.folder / "export/last/classifier.json").read_text())
    assert hits / 16 == pytest.approx(facts["top1"])
    assert all(len(row["top"]) == 2 and row["top"][0]["probability"] >= row["top"][1]["probability"] for row in found)
    out = capsys.readouterr().out
    assert out.startswith("16 images") and found[0]["image"] in out and "16 lines in" in out


def test_files_and_folders(tuned, tmp_path: Path, picture: Callable, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "photos").mkdir()
    files = [tmp_path / f"photos/{number}.jpg" for number in range(25)]
    for number, file in enumerate(files):
        file.write_bytes(picture(number))
    assert main([str(tuned.folder / "export/best"), *map(str, files[:3]), "--jsonl", f"{tmp_path}/some.jsonl"]) == 0
    assert main([str(tuned.folder), str(tmp_path / "photos"), "--jsonl", f"{tmp_path}/all.jsonl", "--batch-size", "4"]) == 0
    some, every = rows(tmp_path / "some.jsonl"), rows(tmp_path / "all.jsonl")
    assert len(every) == 25 and [row["image"] for row in some] == [str(file) for file in files[:3]]
    assert "25 images, the first 20" in capsys.readouterr().out
    files[1].write_bytes(b"no picture")
    assert main([str(tuned.folder), str(tmp_path / "photos"), "--jsonl", f"{tmp_path}/all.jsonl"]) == 0
    assert len(rows(tmp_path / "all.jsonl")) == 24 and "1 of 25 images" in capsys.readouterr().out


def test_refusals(tuned, exported, tmp_path: Path) -> None:
    cases = {
        (str(exported.folder), str(tmp_path)): (CheckpointError, r"classifier\.safetensors does not exist"),
        (str(tuned.folder), str(tmp_path)): (DataError, "holds no image"),
        (str(tuned.folder), f"{tmp_path}/none.jpg"): (DataError, "nothing is there"),
        (str(tuned.folder), str(tmp_path), "--top", "0"): (ConfigError, "at least 1"),
    }
    for argv, (kind, words) in cases.items():
        with pytest.raises(kind, match=words):
            main(list(argv))

"""``python -m finetune.predict``: the same answers as the run's own evaluation, from any images."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcome import refused
from PIL import Image

from finetune.predict import main
from vitssl.errors import CheckpointError, ConfigError, DataError
from vitssl.interop.ours import classifier_of
from vitssl.train.export import read_export


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory, picture: Callable) -> Path:
    """Class folders of images that lie on their side, as their camera noted."""
    folder = tmp_path_factory.mktemp("turned")
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(16):
        (folder / f"{number % 4}").mkdir(exist_ok=True)
        with Image.open(io.BytesIO(picture(number, size=(32, 20)))) as image:
            image.save(folder / f"{number % 4}/{number:02}.jpg", exif=exif)
    return folder


@pytest.fixture(scope="module")
def tuned(finetune: Callable, turned: Path, tmp_path_factory: pytest.TempPathFactory):
    own = ("test.crop_pct=0.8", "data.exif=true", "launch.precision=bf16", "optim.base_lr=1e-2")
    return finetune(tmp_path_factory.mktemp("tuned") / "run", f"test.path={turned}", "test.split=null", *own).ok()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss(found: list[dict]) -> float:
    """Cross entropy of rows that tell all classes."""
    likely = [next(each["probability"] for each in row["top"] if each["class"] == row["label"]) for row in found]
    return -sum(map(math.log, likely)) / len(likely)


def test_answers_are_the_evaluations(tuned, turned: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Turned, cropped and rounded as in the evaluation, and each beside its label."""
    assert main([str(tuned.folder), str(turned), "--jsonl", f"{tmp_path}/new/rows.jsonl"]) == 0
    found, last = rows(tmp_path / "new/rows.jsonl"), tuned.rows("probes.jsonl")[-1]
    keys = [f"{label}/{number:02}.jpg" for label in range(4) for number in range(label, 16, 4)]
    assert [row["image"] for row in found] == keys
    assert all(row["label"] == row["image"][0] and row["right"] == (row["top"][0]["class"] == row["label"]) for row in found)
    assert sum(row["right"] for row in found) / 16 == last["top1"] and loss(found) == pytest.approx(last["loss"], rel=1e-6)
    assert all(len(row["top"]) == 4 and row["top"][0]["probability"] >= row["top"][1]["probability"] for row in found)
    onnx = f"vitssl export {tuned.folder} {tuned.folder}/export/onnx --to onnx"
    assert f"ONNX        {onnx}  (onnx=true does that)" in tuned.out
    out = capsys.readouterr().out
    assert out.startswith("16 images") and found[0]["image"] in out and "16 lines in" in out
    assert f"right of 16 with a label: {last['top1']:.2%}" in out
    argv = [str(tuned.folder), str(turned), "--jsonl", f"{tmp_path}/rows.jsonl"]
    assert main([*argv, "--precision", "fp32", "--top", "4"]) == 0
    assert 1e-6 < abs(loss(rows(tmp_path / "rows.jsonl")) / last["loss"] - 1) < 0.02


def test_the_classifier_as_onnx(finetune: Callable, turned: Path, tmp_path: Path) -> None:
    """Written at the end, in the place of an earlier one; refused at once where it is not installed."""
    places = (f"test.path={turned}", "test.split=null", "onnx=true")
    missing = finetune(tmp_path / "run", *places, trap='import sys\nsys.modules["onnxruntime"] = None')
    refused(missing, "onnxruntime is not installed: pip install 'vitssl[onnx]'")
    assert not (tmp_path / "run").exists()
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra vitssl[onnx] is not installed")
    pytest.importorskip("onnxscript", reason="the extra vitssl[onnx] is not installed")
    (tmp_path / "run/export/onnx").mkdir(parents=True)
    (tmp_path / "run/export/onnx/earlier").touch()
    run = finetune(tmp_path / "run", *places, "length=4").ok()
    model = run.folder / "export/onnx/model.onnx"
    assert f"ONNX        {model}" in run.out and not model.with_name("earlier").exists()
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    state, facts = read_export(run.folder / "export/last", "classifier")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = classifier_of(state, facts)(images)
    model.parent.rename(tmp_path / "elsewhere")
    late = f"now run:  vitssl export {run.folder} {run.folder}/export/onnx --to onnx"
    assert late in finetune(tmp_path / "run", *places, "length=4").ok().out
    assert facts["step"] == 4 and expected.abs().max() > 0
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_any_mixture_of_places(tuned, turned: Path, data: Path, picture: Callable, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for file in ("photos/one.jpg", "two.jpg", "three.jpg"):
        (tmp_path / file).write_bytes(picture(5))
    shards = [f"{data}/{name}" for name in ("train-2.tar", "train-0.tar", "train-0.tar.index")]
    assert Path(shards[-1]).exists()  # as a shell's train-0* would have it
    alone = [f"{tmp_path}/three.jpg", f"{tmp_path}/two.jpg"]
    jsonl = tmp_path / "rows.jsonl"
    assert main([str(tuned.folder), *alone, str(turned), f"{tmp_path}/photos", *shards, "--jsonl", str(jsonl)]) == 0
    found = rows(jsonl)
    keys = [row["image"] for row in found]
    assert len(keys) == 59 and keys[:2] == alone and keys[2:4] == [f"{turned}/0/00.jpg", f"{turned}/0/04.jpg"]
    assert keys[18] == f"{tmp_path}/photos/one.jpg" and keys[19::20] == ["train-2.tar/0040", "train-0.tar/0000"]
    assert "label" not in found[0] and found[0]["top"] == found[18]["top"] and found[19]["label"] == "0"


def test_files_and_folders(tuned, tmp_path: Path, picture: Callable, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "photos").mkdir()
    files = [tmp_path / f"photos/{number}.jpg" for number in range(25)]
    for number, file in enumerate(files):
        file.write_bytes(picture(number))
    assert main([str(tuned.folder / "export/best"), *map(str, files[:3]), "--jsonl", f"{tmp_path}/some.jsonl"]) == 0
    assert main([str(tuned.folder), str(tmp_path / "photos"), "--jsonl", f"{tmp_path}/all.jsonl", "--batch-size", "4"]) == 0
    some, every = rows(tmp_path / "some.jsonl"), rows(tmp_path / "all.jsonl")
    assert main([str(tuned.folder), f"{tmp_path}/photos/?.jpg", "--jsonl", f"{tmp_path}/few.jsonl"]) == 0  # quoted in a shell
    assert [row["image"] for row in rows(tmp_path / "few.jsonl")] == [str(file) for file in files[:10]]
    assert len(every) == 25 and [row["image"] for row in some] == [str(file) for file in files[:3]]
    assert "25 images, the first 20" in capsys.readouterr().out
    files[1].write_bytes(b"no picture")
    assert main([str(tuned.folder), str(tmp_path / "photos"), "--jsonl", f"{tmp_path}/all.jsonl"]) == 0
    assert len(rows(tmp_path / "all.jsonl")) == 24 and "1 of 25 images" in capsys.readouterr().out
    assert main([str(tuned.folder), *map(str, files[:3])]) == 0
    assert "1 of 3 images of the command line left out" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"^the command line: none of 1 images can be used; .*1\.jpg"):
        main([str(tuned.folder), str(files[1])])


def test_refusals(tuned, exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = {
        (str(exported.folder), str(tmp_path)): (CheckpointError, r"classifier\.safetensors does not exist"),
        (str(tuned.folder), str(tmp_path)): (DataError, "holds no image"),
        (str(tuned.folder), f"{tmp_path}/none.jpg"): (DataError, "nothing is there"),
        (str(tuned.folder), str(tmp_path), "--top", "0"): (ConfigError, "at least 1"),
        (str(tuned.folder), str(tmp_path), "--device", "cuda"): (ConfigError, "^--device cuda: torch sees no GPU here; take"),
        (str(tuned.folder), str(tmp_path), "--threshold", "0.2"): (ConfigError, "tells one label of an image; take --top"),
        (str(tuned.folder), str(tmp_path), "--precision", "fp16", "--device", "cpu"): (ConfigError, "fp16 needs a GPU; take"),
        (str(tuned.folder), str(tmp_path), "--jsonl", str(tmp_path)): (ConfigError, "cannot be written .*; name another file"),
        (str(tuned.folder), str(tmp_path), "--jsonl", f"{tmp_path}/rows.jsonl/rows"): (ConfigError, "cannot be written"),
    }
    (tmp_path / "rows.jsonl").write_text("precious\n")
    for argv, (kind, words) in cases.items():
        with pytest.raises(kind, match=words):
            main([*argv, *(() if "--jsonl" in argv else ("--jsonl", f"{tmp_path}/rows.jsonl"))])
        assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
        assert (tmp_path / "rows.jsonl").read_text() == "precious\n"

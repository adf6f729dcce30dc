"""What a pretraining run leaves on disk and shows: files, trackers, pictures, probes; from tars and from a folder of photos."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

FILES = {".lock", "config.yaml", "plan.json", "environment.json", "log.txt", "metrics.jsonl", "probes.jsonl"}


def test_what_a_run_leaves(exported) -> None:
    folder = exported.folder
    assert {path.name for path in folder.iterdir()} == FILES | {"checkpoints", "export", "pictures"}  # and no tensorboard/
    plan = json.loads((folder / "plan.json").read_text())
    known = {"steps": 20, "batch_size": 8, "samples": 60, "processes": 1, "lr": 0.01, "warmup_steps": 5, "precision": "fp32"}
    assert {key: plan[key] for key in known} == known
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["command"][:2] == ["pretrain", "tests/tiny.yaml"] and environment["packages"]["torch"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["encoder"]["arguments"]["embed_dim"] == 24
    log = (folder / "log.txt").read_text()
    assert "plan of" in log and "step 20/20" in log and "python -m finetune encoder=" in log
    assert {path.name for path in (folder / "export").iterdir()} == {"encoder.safetensors", "encoder.json", "README.md"}


def test_what_it_says_of_every_step(exported) -> None:
    rows = exported.rows()
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(math.isfinite(row["loss"]) and row["mae/loss"] == row["loss"] for row in rows)
    told = [row for row in rows if "lr" in row]
    assert [row["step"] for row in told] == [5, 10, 15, 20]
    assert all(row["grad_norm"] > 0 and row["images_per_s"] > 0 and 0 <= row["data_wait"] <= 1 for row in told)
    assert told[0]["lr"] == pytest.approx(0.01 * 4 / 5)  # step 5 is trained at the rate of four fifths of the warm-up
    lines = [line for line in exported.out.splitlines() if line.startswith("step 5/20")]
    mean = sum(row["loss"] for row in rows[:5]) / 5
    assert len(lines) == 1 and f"loss {mean:.4f}" in lines[0] and "eta" in lines[0] and "images/s" in lines[0]


def test_the_held_out_loss_and_pictures(pretrain: Callable, data: Path, tmp_path: Path) -> None:
    run = pretrain(
        tmp_path / "run", f"heldout.path={data}", "heldout.split=test", "heldout.every=5", "optim.base_lr=1e-30"
    ).ok()
    rows = run.rows("probes.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert len({row["heldout/loss"] for row in rows}) == 1  # nothing moved, so the same crops and masks give the same number
    sheets = [Image.open(path) for path in sorted((run.folder / "pictures").iterdir())]
    assert len(sheets) == 4 and all(sheet.tobytes() == sheets[0].tobytes() for sheet in sheets)
    assert sheets[0].size[0] >= 4 * 16 and sheets[0].size[1] >= 2 * 16


def test_two_processes_measure_what_one_does(pretrain: Callable, data: Path, tmp_path: Path) -> None:
    """Held-out images that do not divide, a probe of both kinds, and its baselines."""
    parts = {"bank": "train", "queries": "test"}
    probe = [f"probe.{part}.{key}" for part, split in parts.items() for key in (f"path={data}", f"split={split}")]
    overrides = (*probe, "probe.every=10", f"heldout.path={data}", "heldout.split=test", "heldout.samples=7")
    one, two = pretrain(tmp_path / "one", *overrides).ok(), pretrain(tmp_path / "two", *overrides, processes=2).ok()
    ours, theirs = one.rows("probes.jsonl"), two.rows("probes.jsonl")
    assert [row["step"] for row in ours] == [0, 0, 10, 10, 20, 20] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert all(mine[key] == pytest.approx(other[key], rel=1e-5) for key in mine)
    known = {"knn_20", "fewshot_5", "ridge", "rankme", "alpha_req", "pixels_knn_20", "heldout/loss"}
    assert known <= {key for row in ours for key in row}
    assert "kNN-20" in one.out.splitlines()[-3] and "raw pixels" in one.out


def test_a_probe_of_fewer_images_than_processes(
    pretrain: Callable, write_shard: Callable, data: Path, exported, tmp_path: Path
) -> None:
    """One query for two processes, larger images than the pixels' baseline takes, and weights that are not random."""
    write_shard(tmp_path / "query.tar", range(1))
    probe = [f"probe.bank.path={data}", "probe.bank.split=train", f"probe.queries.path={tmp_path}/query.tar"]
    run = pretrain(
        tmp_path / "run", *probe, "encoder.image_size=48", "length=1", f"init.weights={exported.folder}", processes=2
    ).ok()
    assert [row["queries"] for row in run.rows("probes.jsonl") if "queries" in row] == [1, 1, 1]
    assert "step 0  the weights it starts from: kNN-20 " in run.out and "random initialisation" not in run.out


def test_tensorboard_holds_it_all(pretrain: Callable, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = pretrain(tmp_path / "run", "log.trackers=[tensorboard]").ok()
    folders = {path.parent for path in (run.folder / "tensorboard").rglob("events.out.*")}
    assert len(folders) == 1
    events = EventAccumulator(str(folders.pop()), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss", "lr", "grad_norm", "images_per_s", "data_wait", "fixed_train/loss"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [5, 10, 15, 20]
    mean = sum(run.losses()[15:]) / 5
    assert events.Scalars("loss")[-1].value == pytest.approx(mean, rel=1e-5)
    (images,) = tags["images"]
    assert "reconstructions" in images and [event.step for event in events.Images(images)] == [10, 20]
    text = next(tag for tag in tags["tensors"] if "config" in tag)
    words = events.Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert "encoder.arguments.embed_dim: 24" in words and "data.path: /" in words and "heldout.path: None" in words


def test_compiled_blocks_keep_their_names(pretrain: Callable, exported, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", "launch.compile=true", "length=3", "optim.warmup=1").ok()
    plain = pretrain(tmp_path / "plain", "length=3", "optim.warmup=1").ok()
    ours, theirs = (load_file(each.folder / "export/encoder.safetensors") for each in (run, plain))
    assert ours.keys() == theirs.keys() == load_file(exported.folder / "export/encoder.safetensors").keys()
    assert run.losses() == pytest.approx(plain.losses(), rel=1e-4)


def test_weights_to_start_from(pretrain: Callable, exported, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", f"init.weights={exported.folder}", "length=1").ok()  # step 0 has the rate 0: nothing moves
    before, after = load_file(exported.folder / "export/encoder.safetensors"), run.tensors()
    assert all(torch.equal(after[f"state/encoder.vit.{name}"], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("precision", ["bf16"])
def test_another_precision_trains_nearly_the_same(pretrain: Callable, exported, tmp_path: Path, precision: str) -> None:
    run = pretrain(tmp_path / "run", f"launch.precision={precision}").ok()
    assert run.losses() == pytest.approx(exported.losses(), rel=2e-2) and run.losses() != exported.losses()
    assert {tensor.dtype for tensor in run.tensors().values()} == {torch.float32}


def test_your_own_pictures(start: Callable, tmp_path: Path, picture: Callable) -> None:
    """A folder of any images: nested, of every mode and size, beside files that are none."""
    kinds = [
        ("a.jpg", {}), ("deep/er/b.JPG", {"size": (90, 30)}), ("deep/c.png", {"mode": "RGBA", "format": "PNG"}),
        ("d.png", {"mode": "L", "format": "PNG"}), ("e.jpeg", {"mode": "CMYK"}), ("f.png", {"mode": "P", "format": "PNG"}),
        ("g.png", {"mode": "LA", "format": "PNG"}), ("h.webp", {"format": "WEBP"}), ("i.bmp", {"format": "BMP"}),
        ("j.png", {"mode": "1", "format": "PNG"}), ("k.png", {"mode": "I;16", "format": "PNG"}), ("l.gif", {"format": "GIF"}),
    ]  # fmt: skip
    for number, (name, options) in enumerate(kinds):
        path = tmp_path / "my photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, **{"mode": "RGB", **options}))
    (tmp_path / "my photos/notes.txt").write_text("no image")
    small = ["encoder.image_size=32", "encoder.arguments={embed_dim: 24, depth: 1, num_heads: 2}", "batch_size=6", "length=4"]
    decoder = "objectives.mae.decoder={dim: 16, depth: 1, heads: 2}"
    argv = ["configs/pretrain/small.yaml", f"data.path={tmp_path / 'my photos'}", *small, decoder, "data.workers=0"]
    run = start("pretrain", tmp_path / "run", *argv, "launch.device=cpu").ok()
    assert "12 images" in run.out and len(run.losses()) == 4
    assert json.loads((run.folder / "export/encoder.json").read_text())["architecture"] == "vit_small_patch16_224"


def test_a_probe_whose_classes_do_not_meet_is_refused(pretrain: Callable, tmp_path: Path, picture: Callable) -> None:
    for folder, names in {"bank": "abcd", "queries": "bde"}.items():
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "0.jpg").write_bytes(picture(ord(name)))
    argv = [f"probe.{part}.path={tmp_path / part}" for part in ("bank", "queries")]
    run = pretrain(tmp_path / "run", *argv)
    assert run.codes == [2] and "queries: 1 classes are not among those of" in run.err and "bank: e; correct one" in run.err
    assert not (tmp_path / "run").exists()
    shutil.rmtree(tmp_path / "queries/e")
    rows = pretrain(tmp_path / "run", *argv, "length=2", "probe.every=2").ok().rows("probes.jsonl")
    # the same pictures under the same names, though "b" is number 0 of the one folder and 1 of the other
    assert [row["knn_4"] for row in rows if "knn_4" in row] == [1.0, 1.0]

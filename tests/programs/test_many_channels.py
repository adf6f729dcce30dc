"""Images of six channels from end to end: arrays in shards are pretrained on, watched, probed and fine-tuned on."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from outcome import refused
from PIL import Image

from finetune.predict import main as predict

SIX = ["encoder.channels=6", "data.mean=[0.5,0.5,0.5,0.5,0.5,0.5]", "data.std=[0.3,0.3,0.3,0.3,0.3,0.3]"]
ARRAYS = [*SIX, "data.arrays=true"]


@pytest.fixture(scope="module")
def cubes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two train shards of 20 and a test shard of 12 arrays, bytes with channels last and floats with channels first."""
    folder = tmp_path_factory.mktemp("cubes")
    for name, numbers in (("train-0", range(20)), ("train-1", range(20, 40)), ("test-0", range(40, 52))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in numbers:
                values = np.random.default_rng(number).integers(0, 256, (4, 5, 6), dtype=np.uint8).repeat(5, 0).repeat(4, 1)
                buffer = io.BytesIO()
                np.save(buffer, values if number % 2 else (values / 255).astype(np.float32).transpose(2, 0, 1))
                for extension, content in (("npy", buffer.getvalue()), ("cls", str(number % 4).encode())):
                    info = tarfile.TarInfo(f"{number:04}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_six_channels_are_pretrained_and_fine_tuned(
    pretrain: Callable, finetune: Callable, cubes: Path, tmp_path: Path, workers: int
) -> None:
    place = [f"data.path={cubes}", f"data.workers={workers}"]
    probe = [f"probe.{part}={cubes}" for part in ("bank.path", "queries.path")]
    run = pretrain(tmp_path / "run", *ARRAYS, *place, *probe, "probe.bank.split=train", "probe.queries.split=test").ok()
    losses = run.losses()
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert any("knn_20" in row for row in run.rows("probes.jsonl")) and any(
        "pixels_knn_20" in row for row in run.rows("probes.jsonl")
    )
    with Image.open(sorted((run.folder / "pictures").glob("*.png"))[-1]) as picture:
        assert picture.mode == "RGB"
    facts = json.loads((run.folder / "export/encoder.json").read_text())
    assert facts["arguments"]["in_chans"] == 6 and len(facts["mean"]) == len(facts["std"]) == 6
    tuned = [f"encoder={run.folder}", *place, f"test.path={cubes}", "data.arrays=true", "augment.erasing=0.5"]
    last = finetune(tmp_path / "tuned", *tuned).ok().rows("probes.jsonl")[-1]
    assert predict([str(tmp_path / "tuned"), f"{cubes}/test-0.tar", "--jsonl", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sum(row["right"] for row in rows) / 12 == last["top1"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SIX, ["images decode to 1, 3 or 4 channels, not 6", "data.arrays=true"]),
        (["encoder.channels=6", "data.arrays=true"], ["data.mean has 3 and data.std 3", "vitssl check DATA --channels=6"]),
        ([], [".npy", "is an .npy array; set data.arrays=true", "nor do ten others"]),
        (["data.arrays=true"], [".npy", "is an array [", "encoder.channels is 3", "nor do ten others"]),
    ],
)
def test_what_does_not_fit_is_one_line(
    pretrain: Callable, cubes: Path, tmp_path: Path, settings: list[str], words: list[str]
) -> None:
    refused(pretrain(tmp_path / "run", f"data.path={cubes}", *settings), *words)
    assert not (tmp_path / "run/checkpoints").exists()


def test_pictures_are_no_six_channels(pretrain: Callable, tmp_path: Path) -> None:
    refused(pretrain(tmp_path / "run", *ARRAYS), "a JPEG has 1, 3 or 4 channels, and encoder.channels is 6")


def test_six_channels_cannot_be_augmented_as_pictures_are(
    pretrain: Callable, finetune: Callable, cubes: Path, tmp_path: Path
) -> None:
    run = pretrain(tmp_path / "run", *ARRAYS, f"data.path={cubes}", "length=2").ok()
    place = [f"encoder={run.folder}", f"data.path={cubes}", f"test.path={cubes}"]
    refused(finetune(tmp_path / "tuned", *place), "images decode to 1, 3 or 4 channels, not 6")
    policy = ["data.arrays=true", "augment.rand_augment=rand-m9-mstd0.5-inc1"]
    refused(finetune(tmp_path / "tuned", *place, *policy), "augment.rand_augment: is for 1 or 3 channels, not 6")

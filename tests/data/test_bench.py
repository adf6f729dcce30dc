"""The benchmark of the data engine measures every pipeline on the same images; how fast they are is no test's business."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from vitssl.config import build
from vitssl.data.bench import advice, bench_data
from vitssl.data.sources import open_source
from vitssl.report import Report
from vitssl.sections import DataConfig
from vitssl.views import Photometric, View


@pytest.mark.parametrize(
    "views",
    [
        [View((16, 16), scale=(0.2, 1.0), flip=0.5)],
        [View((8, 8)), View((8, 8), scale=(0.5, 1.0), photometric=Photometric(0.8, grey=0.2, blur=1.0, solarize=0.2))],
    ],
)
@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_every_pipeline_is_measured(shards: Path, photos: Path, capsys: pytest.CaptureFixture, kind: str, views: list) -> None:
    source, config = open_source({"shards": shards, "folder": photos}[kind]), build(DataConfig, {"workers": 0}, where="here")
    row = bench_data(source, config, views, channels=3, device="cpu", report=Report(), seconds=0.05)
    names = ["torchvision", *(["webdataset"] if kind == "shards" else [])]
    starts = {"resume_at", "start_s", "resume_s", *(["skip_s"] if kind == "shards" else [])}
    assert (
        set(row)
        == {"ours_per_core", "read", "decode", "views", "transfer", "short_side", "workers", "with_workers", "main_busy"}
        | {f"{name}_per_core" for name in names}
        | {f"times_{name}" for name in names}
        | starts
    )
    assert row["resume_at"] == 64 and all(row[name] > 0 for name in starts)
    assert all(row[f"{name}_per_core"] > 0 and row[f"times_{name}"] > 0 for name in names) and row["with_workers"] > 0
    assert row["read"] + row["decode"] + row["views"] + row["transfer"] == pytest.approx(1, abs=0.01)
    shown = capsys.readouterr().out.splitlines()
    assert json.loads(shown[-1]) == row and f"{len(views)} views" in shown[0]


ADVICE = {
    "enough": (600.0, 256, "feeds the step (500 images/s) 1.2 times over: nothing to do"),
    "large photographs": (
        305.0, 500, "feeds 61% of the step (500 images/s): 2 more cores (data.workers=4), or 256-px shards"
        " (vitssl pack --short-side 256), or data.repeats=2",
    ),
    "small pictures": (90.0, 256, "feeds 18% of the step (500 images/s): 5 more cores (data.workers=7), or data.repeats=6"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADVICE)
def test_advice(case: str) -> None:
    feed, side, words = ADVICE[case]
    row = {"with_workers": feed, "step_rate": 500.0, "ours_per_core": 100.0, "workers": 2, "short_side": side}
    assert advice(row) == words


def test_the_reference_unpickles_nothing(tmp_path: Path, write_tar: Callable, encoded: Callable) -> None:
    trap = pickle.dumps(Trap(str(tmp_path / "sprung")))
    members = {}
    for key in range(70):
        members |= {f"{key}.png": encoded(key), f"{key}.pickle": trap, f"{key}.pyd": trap}
    source = open_source(write_tar(tmp_path / "s.tar", members))
    bench_data(
        source,
        build(DataConfig, {"workers": 0}, where="here"),
        [View((8, 8))],
        channels=3,
        device="cpu",
        report=Report(),
        seconds=0.05,
    )
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists(), "the trap works"


class Trap:
    """Unpickling it leaves a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)

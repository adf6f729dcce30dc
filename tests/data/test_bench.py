"""The benchmark of the data engine measures every pipeline on the same images; how fast they are is no test's business."""

import json
from pathlib import Path

import pytest

from vitssl.config import build
from vitssl.data.bench import bench_data
from vitssl.data.sources import open_source
from vitssl.report import Report
from vitssl.sections import DataConfig
from vitssl.views import View


@pytest.mark.parametrize(
    "views", [[View((16, 16), scale=(0.2, 1.0), flip=0.5)], [View((8, 8)), View((8, 8), scale=(0.5, 1.0))]]
)
@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_every_pipeline_is_measured(shards: Path, photos: Path, capsys: pytest.CaptureFixture, kind: str, views: list) -> None:
    source, config = open_source({"shards": shards, "folder": photos}[kind]), build(DataConfig, {"workers": 0}, where="here")
    row = bench_data(source, config, views, channels=3, device="cpu", report=Report(), seconds=0.05)
    names = ["torchvision", *(["webdataset"] if kind == "shards" else [])]
    starts = {"resume_at", "start_s", "resume_s", *(["skip_s"] if kind == "shards" else [])}
    assert (
        set(row)
        == {"ours_per_core", "read", "decode", "views", "workers", "with_workers"}
        | {f"{name}_per_core" for name in names}
        | {f"times_{name}" for name in names}
        | starts
    )
    assert row["resume_at"] == 64 and all(row[name] > 0 for name in starts)
    assert all(row[f"{name}_per_core"] > 0 and row[f"times_{name}"] > 0 for name in names) and row["with_workers"] > 0
    assert row["read"] + row["decode"] + row["views"] == pytest.approx(1, abs=0.01)
    shown = capsys.readouterr().out.splitlines()
    assert json.loads(shown[-1]) == row and f"{len(views)} views" in shown[0]

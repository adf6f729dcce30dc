"""Probes on the way: the numbers of ``finetune.evaluate``, in one line, and how far given weights have moved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcome import refused

from finetune.evaluate import main
from pretrain.config import ONLINE, PretrainConfig
from pretrain.probing import by_name, in_words, nearest
from vitssl.config import build
from vitssl.probes.protocols import PROTOCOLS, Judged, needed
from vitssl.probes.similarity import linear_cka
from vitssl.sections import DataConfig
from vitssl.train.export import load_encoder


@pytest.fixture(scope="module")
def probe(data: Path) -> list[str]:
    parts = {"bank": "train", "queries": "test"}
    return [f"probe.{part}.{key}" for part, split in parts.items() for key in (f"path={data}", f"split={split}")]


def test_the_list_is_of_all_that_need_pooled_features_alone() -> None:
    assert set(ONLINE) == {name for name in PROTOCOLS if not needed([name])}
    assert set(build(PretrainConfig, {}, where="here").probe.protocols) < set(ONLINE)


def test_on_the_way_and_afterwards_are_the_same_numbers(
    pretrain: Callable, data: Path, probe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The last probe of a run beside ``finetune.evaluate`` on what it exported, by every protocol but the slowest."""
    protocols = f"[{','.join(name for name in ONLINE if name != 'logistic')}]"
    run = pretrain(tmp_path / "run", *probe, f"probe.protocols={protocols}", "probe.seeds=2", "length=6", "probe.every=6").ok()
    row = run.rows("probes.jsonl")[-1]
    sets = [f"data.path={data}", "data.split=train", f"test.path={data}", "test.split=test", "crop_pct=1.0", "seeds=2"]
    places = [f"features={tmp_path}/features", f"out={tmp_path}/rows.json", "device=cpu"]
    assert main([*sets, *places, f"encoder={run.folder}", f"protocol={protocols}"]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    judged = by_name(Judged(*(each[key] for key in Judged._fields)) for each in found)
    known = {"step", "bank", "queries"}
    assert row["step"] == 6 and row.keys() == judged.keys() | known and len(judged) == 10
    for name, value in judged.items():
        assert row[name] == pytest.approx(value, rel=1e-5), name
    lines = [line for line in run.out.splitlines() if line.startswith("step 6  encoder: ")]
    assert len(lines) == 1 and lines[0].endswith("(60 labelled images judge 16)")
    assert f"kNN-20 {row['knn_20']:.1%}, 5 shots {row['fewshot_5']:.1%}, ridge {row['ridge']:.1%}, linear (MAE)" in lines[0]


def test_drift_from_the_weights_it_began_with(pretrain: Callable, probe: list[str], exported, tmp_path: Path) -> None:
    """1 at the beginning and while the encoder waits, less afterwards; the same where the run was cut in the middle."""
    given = (f"init.weights={exported.folder}", "init.head_warmup=4", "optim.warmup=1", "probe.protocols=[knn]")
    options = (*probe, *given, "length=8", "probe.every=4", "checkpoint.every=4")
    run = pretrain(tmp_path / "run", *options).ok()
    rows = [row for row in run.rows("probes.jsonl") if "cka" in row]
    assert [row["step"] for row in rows] == [0, 4, 8] and all("knn_20" in row for row in rows)
    assert rows[0]["cka"] == pytest.approx(1) == rows[1]["cka"] and 0 < rows[2]["cka"] < 0.9999
    assert rows[0]["knn_20"] == rows[1]["knn_20"]
    assert "the weights it starts from: kNN-20" in run.out and ", CKA 1.000 (60 labelled" in run.out
    assert f"drift     CKA {rows[2]['cka']:.3f} with the weights it started from, on 16 images" in run.out
    words = f"{rows[0]['knn_20']:.1%} at step 0 -> {rows[2]['knn_20']:.1%} at step 8, raw pixels"
    assert words in run.out
    before, after = (load_encoder(each.folder)[0].eval() for each in (exported, run))
    assert rows[2]["cka"] == pytest.approx(by_hand(before, after, run.folder), rel=1e-4)
    shutil.rmtree(run.folder / "checkpoints/step_00000008")
    again = pretrain(tmp_path / "run", *options).ok()
    assert [row for row in again.rows("probes.jsonl") if "cka" in row] == rows
    shutil.rmtree(run.folder / "checkpoints/step_00000008")
    other = pretrain(tmp_path / "other", *options, f"init.resume={run.folder}", processes=2).ok()
    (last,) = [row for row in other.rows("probes.jsonl") if "cka" in row]
    assert last["step"] == 8 and last["cka"] == pytest.approx(rows[2]["cka"], rel=1e-4)


def by_hand(before, after, folder: Path) -> float:
    """CKA of the queries, each image through both encoders."""
    import yaml

    from vitssl.data.feed import evaluation_samples
    from vitssl.data.sources import open_source
    from vitssl.views import View

    config = yaml.safe_load((folder / "config.yaml").read_text())
    source, view = open_source(config["probe"]["queries"]["path"], split="test"), View(size=(16, 16), resize=16)
    samples = evaluation_samples(source, DataConfig(), [view], channels=3)
    mean, std = (torch.tensor(config["data"][key])[:, None, None] for key in ("mean", "std"))
    images = torch.cat([(samples[number].views[view] / 255 - mean) / std for number in range(16)])
    with torch.no_grad():
        return linear_cka(*(encoder(images).pool("mean") for encoder in (before, after)))


def test_drift_without_labels(pretrain: Callable, data: Path, exported, tmp_path: Path) -> None:
    """On images held out; where other ones are held out later it says so instead of comparing."""
    options = (f"init.weights={exported.folder}", "length=6", "probe.every=3", "checkpoint.every=3", "heldout.samples=9")
    held = (f"heldout.path={data}", "heldout.split=test")
    run = pretrain(tmp_path / "run", *options, *held).ok()
    rows = [row for row in run.rows("probes.jsonl") if "cka" in row]
    assert [row["step"] for row in rows] == [0, 3, 6] and all(row["queries"] == 9 for row in rows)
    assert rows[0]["cka"] == pytest.approx(1) and rows[2]["cka"] < 1
    assert f"step 6  CKA {rows[2]['cka']:.3f} with the weights it started from (9 images)" in run.out
    assert "kNN" not in run.out and "drift     CKA" in run.out
    shutil.rmtree(run.folder / "checkpoints/step_00000006")
    again = pretrain(tmp_path / "run", *options, *held, "heldout.split=train").ok()
    assert "start_features.safetensors is of other images or not there: drift is not measured" in again.out
    assert [row["step"] for row in again.rows("probes.jsonl") if "cka" in row] == [0, 3]


def test_what_is_named() -> None:
    rows = [Judged("knn", "k=10", 0.5), Judged("knn", "k=20", 0.25), Judged("rankme", "of 8", 3.0)]
    rows += [Judged("alpha_req", "exponent", 1.5)]
    rows += [Judged("fewshot", "1 shots", value, seed) for seed, value in enumerate((0.1, 0.2))]
    rows += [Judged("ridge", "penalty 1e-4 N", 0.75)]
    values = by_name(rows)
    assert values == pytest.approx(
        {"knn_10": 0.5, "knn_20": 0.25, "rankme": 3.0, "alpha_req": 1.5, "fewshot_1": 0.15, "ridge": 0.75}
    )
    assert in_words(values) == "kNN-20 25.0%, 1 shots 15.0%, ridge 75.0%, RankMe 3.0, alpha 1.50"
    assert in_words({"knn_4": 1.0, "cka": 0.5}) == "kNN-4 100.0%, CKA 0.500" and in_words({}) == ""
    assert nearest({"pixels_knn_20": 1.0, "knn": 1.0}, "knn", 20) is None


def test_a_protocol_that_does_not_run_on_the_way(pretrain: Callable, probe: list[str], tmp_path: Path) -> None:
    refused(pretrain(tmp_path / "run", *probe, "probe.protocols=[knn,linear_dinov2]"), "linear_dinov2 is none of knn, fewshot")

"""``protocol=finetune``: fine-tuning in evaluate's table, by the real program, once."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.evaluate import PROTOCOLS, EvaluateConfig, main
from vitssl.config import build
from vitssl.errors import ConfigError, DataError


@pytest.fixture
def argv(exported, data: Path, tmp_path: Path) -> list[str]:
    sets = [f"data.path={data}", "data.split=train", f"test.path={data}", "test.split=test", "data.workers=0"]
    own = [f"encoder=random:{exported.folder}", f"features={tmp_path}/features", f"out={tmp_path}/rows.json", "device=cpu"]
    return [*sets, *own, "seeds=1", "finetune={length: 6, batch_size: 8}"]


def test_two_processes_tune_as_the_program_does(argv: list[str], tmp_path: Path, start: Callable, capsys) -> None:
    """The row is what one process of ``python -m finetune`` measures with the file that was written; nothing is done twice."""
    assert "1 runs in " in start("finetune.evaluate", tmp_path, *argv, "protocol=[finetune,knn]", processes=2).ok().out
    found = json.loads((tmp_path / "rows.json").read_text())
    (row,) = [row for row in found if row["protocol"] == "finetune"]
    assert [row["protocol"] for row in found][-1] == "finetune" and row["setting"] == "6, lr 0.001" and row["images"] == 16
    (written,) = (tmp_path / "features/finetune").glob("*/run.yaml")
    alone = start("finetune", tmp_path / "alone", str(written)).ok()
    result = json.loads((alone.folder / "results/results.json").read_text())
    theirs = json.loads((written.parent / "run-seed0/results/results.json").read_text())
    assert row["value"] == result["top1"] and theirs["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert row["interval"] == [pytest.approx(result["top1_low"]), pytest.approx(result["top1_high"])]
    assert main([*argv, "protocol=finetune"]) == 0
    told = capsys.readouterr().out
    assert "runs in" not in told and "to look at" not in told, "it is there, and no frozen features are asked for"
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    assert main([*(word for word in argv if word != "seeds=1"), "seeds=2", "protocol=finetune"]) == 0
    first, second = json.loads((tmp_path / "rows.json").read_text())
    assert first == row and second["seed"] == 1 and "1 runs in" in capsys.readouterr().out, "only the other is run"


def test_all_is_what_is_cheap() -> None:
    assert build(EvaluateConfig, {"protocol": "all"}, where="here").protocol == [*PROTOCOLS]
    assert build(EvaluateConfig, {"protocol": ["all", "finetune"]}, where="here").protocol == [*PROTOCOLS, "finetune"]


def test_refusals(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*(word for word in argv if not word.startswith("finetune=")), "protocol=finetune"]
    for wrong, message in (
        ("{encoder: runs/other}", r"finetune.encoder: is not given here; evaluate sets it"),
        ("{head: {pooling: class}}", r"finetune.head.pooling=class: is not given here; set pooling="),
        ("{test: {split: other}}", r"finetune.test.split: is not given here"),
        ("{optim: {base_lr: -1}}", r"optim.base_lr=-1"),
        ("{lenght: 5ep}", r"lenght"),
    ):
        with pytest.raises(ConfigError, match=message):
            main([*argv, f"finetune={wrong}"])
    (tmp_path / "python").write_text("#!/bin/sh\necho 'error: no room' >&2\nexit 2\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(
        DataError, match=r"protocol=finetune ended with code 2 \(error: no room\); its log is .*run-seed0/log.txt"
    ):
        main(argv)

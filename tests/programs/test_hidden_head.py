"""The ViT paper's head with a hidden layer, as a run: where it begins, who can read it, and that its readers agree."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.predict import main as predict
from vitssl.cli import main as vitssl
from vitssl.errors import CheckpointError

SETTINGS = ("head.hidden=10", "optim.base_lr=1e-2")


@pytest.fixture(scope="module")
def tuned(finetune: Callable, tmp_path_factory: pytest.TempPathFactory):
    return finetune(tmp_path_factory.mktemp("hidden") / "run", *SETTINGS, "test.crop_pct=0.8").ok()


def test_it_begins_at_chance_and_trains_both_layers(tuned) -> None:
    assert tuned.losses()[0] == pytest.approx(math.log(4), rel=1e-6)
    state = load_file(tuned.folder / "export/last/classifier.safetensors")
    assert state["pre_logits.0.weight"].shape == (10, 24) and state["head.weight"].shape == (4, 10)
    assert state["head.weight"].abs().max() > 0 and state["pre_logits.0.bias"].abs().max() > 0
    assert json.loads((tuned.folder / "export/last/classifier.json").read_text())["head"] == {"hidden": 10}


def test_its_card_loads_it(tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tuned.folder / "export/last")
    card, found = Path("README.md").read_text(), {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], found)
    assert found["model"](torch.zeros(1, 3, 16, 16)).shape == (1, 4) and "library_name: vitssl" in card


def test_predict_and_onnx_read_it_and_others_say_no(tuned, data: Path, tmp_path: Path) -> None:
    assert predict([str(tuned.folder), f"{data}/test-0.tar", "--jsonl", f"{tmp_path}/rows.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    hits = sum(row["top"][0]["class"] == str(number % 4) for number, row in enumerate(rows))
    assert hits / 16 == pytest.approx(tuned.rows("probes.jsonl")[-1]["top1"])
    assert vitssl(["export", str(tuned.folder), str(tmp_path / "onnx"), "--to", "onnx"]) == 0
    for to in ("timm", "transformers"):
        with pytest.raises(CheckpointError, match=f"a hidden layer of 10, and {to}'s ViT has no place for that"):
            vitssl(["export", str(tuned.folder), str(tmp_path / to), "--to", to])

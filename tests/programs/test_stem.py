"""A stem that timm does not have, in real runs: pretrained, exported, loaded, fine-tuned, and what is refused on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcome import refused

import vitssl
from vitssl.cli import main as tools
from vitssl.errors import CheckpointError
from vitssl.interop.ours import classifier_of
from vitssl.train.export import read_export

T2T = ("encoder.stem=t2t", "encoder.image_size=32", "encoder.patch_size=16", "encoder.positions=learned")
PAIRS = ("objectives.mae=null", "objectives.simclr={hidden: 16, out: 8}", "heldout.pictures=0")


@pytest.fixture(scope="module")
def stemmed(pretrain: Callable, tmp_path_factory: pytest.TempPathFactory):
    return pretrain(tmp_path_factory.mktemp("stem") / "run", *T2T, *PAIRS, "length=4").ok()


def test_it_is_recorded_and_loads(stemmed, tmp_path: Path) -> None:
    facts = json.loads((stemmed.folder / "export/encoder.json").read_text())
    assert facts["encoder"]["stem"] == "t2t"
    encoder, _ = vitssl.load_encoder(stemmed.folder / "export")
    assert encoder.stem == "t2t" and encoder(torch.zeros(1, 3, 32, 32)).patches.shape == (1, 4, 24)
    assert "vitssl.load_encoder" in (stemmed.folder / "export/README.md").read_text()
    for library in ("timm", "transformers"):
        with pytest.raises(CheckpointError, match=f"a Tokens-to-Token stem, and {library} has no place for it"):
            tools(["export", str(stemmed.folder), str(tmp_path / library), "--to", library])


def test_its_classifier_comes_back(finetune: Callable, stemmed, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", f"encoder={stemmed.folder}", "augment.mixup=0", "augment.cutmix=0").ok()
    state, facts = read_export(run.folder / "export/last", "classifier")
    model = classifier_of(state, facts)
    assert facts["stem"] == "t2t" and model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    assert "classifier_of" in (run.folder / "export/last/README.md").read_text()


def test_mae_refuses_it_before_anything_is_written(pretrain: Callable, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", *T2T)
    refused(run, "objectives.mae masks patches, and this encoder's stem has mixed the pixels of neighbouring ones before")
    assert not (tmp_path / "run").exists()

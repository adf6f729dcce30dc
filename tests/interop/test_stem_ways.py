"""A hybrid's stem on its way out and back: timm has it, transformers' ViTs here have none."""

import json
from pathlib import Path

import pytest
import torch

from vitssl.cli import main
from vitssl.errors import CheckpointError
from vitssl.models.encoder import Encoder
from vitssl.sections import EncoderConfig
from vitssl.train.export import encoder_facts, load_encoder, write_export


@pytest.fixture
def exported(tmp_path: Path) -> Encoder:
    torch.manual_seed(0)
    values = {"image_size": 64, "arguments": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
    section = EncoderConfig.model_validate({"name": "vit_tiny_r_s16_p8_224"} | values)
    encoder = Encoder.create(section.name, **section.model_dump(exclude={"name"}))
    facts = encoder_facts(encoder, section, mean=[0.5] * 3, std=[0.5] * 3, pooling="mean")
    write_export(tmp_path / "run/export", "encoder", encoder.state(), facts)
    return encoder


def test_there_and_back_by_timm(exported: Encoder, tmp_path: Path) -> None:
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "timm"]) == 0
    assert main(["import", f"timm:{tmp_path / 'out'}", str(tmp_path / "back")]) == 0
    again, _ = load_encoder(tmp_path / "back")
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in exported.state().items())
    said = json.loads((tmp_path / "back/encoder.json").read_text())["encoder"]
    assert (said["patch_size"], said["channels"], again.spec.patch) == (None, 3, (32, 32))


def test_transformers_has_none(exported: Encoder, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra vitssl[transformers] is not installed")
    with pytest.raises(CheckpointError, match="a convolutional network before its blocks, and transformers' ViTs here have"):
        main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "transformers"])
    assert not (tmp_path / "out").exists()

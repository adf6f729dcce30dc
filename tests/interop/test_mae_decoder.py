"""A masked autoencoder with its decoder becomes a ViTMAEForPreTraining that paints the same patches and has the same loss."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vitssl.cli import main
from vitssl.errors import CheckpointError
from vitssl.interop.ours import create
from vitssl.interop.parity import exactly
from vitssl.losses.pixels import masked_mse, normalize_patches, patchify
from vitssl.models.encoder import Encoder
from vitssl.objectives.mae import MAE
from vitssl.sections import EncoderConfig
from vitssl.train.checkpoint import Saved, save
from vitssl.train.export import encoder_facts, write_export

transformers = pytest.importorskip("transformers", reason="the extra vitssl[transformers] is not installed")
SETTINGS = {"mask_ratio": 0.7, "decoder": {"dim": 8, "depth": 2, "heads": 2, "mlp_ratio": 3.0}}


def pretrained(
    folder: Path, *, step: int = 5, attention: str = "self", places: str = "sincos", **changes: Any
) -> tuple[Encoder, MAE]:
    """A run as python -m pretrain leaves it, as far as it matters here."""
    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    values = {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "arguments": arguments, "positions": "sincos"}
    section = EncoderConfig.model_validate(values | changes)
    encoder = create(section)
    settings = SETTINGS | {"decoder": SETTINGS["decoder"] | {"attention": attention, "positions": places}}
    mae = MAE(MAE.Config.model_validate(settings), encoder.spec)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *mae.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    facts = encoder_facts(encoder, section, mean=[0.5] * 3, std=[0.2] * 3, pooling="mean", method="mae", run="x", step=5)
    write_export(folder / "export", "encoder", encoder.state(), facts)
    state = {f"objectives.mae.{name}": tensor for name, tensor in mae.state_dict().items()}
    state |= {f"encoder.vit.{name}": tensor for name, tensor in encoder.state().items()}
    save(folder / "checkpoints", Saved(step=step, state=state, moments={}, facts={}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"objectives": {"mae": settings}}))
    return encoder, mae


@pytest.mark.parametrize("places", ["sincos", "learned"])
def test_it_paints_the_same_and_has_the_same_loss(tmp_path: Path, capsys: pytest.CaptureFixture, places: str) -> None:
    encoder, mae = pretrained(tmp_path / "run", places=places)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "transformers", "--decoder"]) == 0
    assert "outputs differ by" in capsys.readouterr().out
    model = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out").eval()
    for name, parameter in (
        ("embed.weight", "decoder_embed.weight"),
        ("blocks.1.mlp.fc2.bias", "decoder_layers.1.mlp.fc2.bias"),
    ):
        assert torch.equal(mae.decoder.state_dict()[name], model.decoder.state_dict()[parameter])
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    keep = noise.argsort(dim=1)[:, : mae.num_keep]
    with exactly(encoder, mae, model):
        found, painted = model(images, noise=noise), mae.decoder(encoder(images, keep=keep), keep)
        mask = torch.ones(3, 16, dtype=torch.bool).scatter(1, keep, False)
        target, _, _ = normalize_patches(patchify(images, (4, 4)))
        loss = masked_mse(painted, target, mask)
    assert torch.equal(found.mask.bool(), mask)
    assert (found.logits - painted).abs().max() < 1e-12
    assert abs(found.loss - loss) < 1e-12
    assert main(["import", f"hf:{tmp_path / 'out'}", str(tmp_path / "back")]) == 0
    assert "beside it" in capsys.readouterr().out


WRONG = {
    "timm has no masked autoencoder": ({}, ["--to", "timm"], None),
    "holds no checkpoint with an MAE decoder": ({}, ["--to", "transformers"], "checkpoints"),
    "its export is of step 5, its newest checkpoint of step 7": ({"step": 7}, ["--to", "transformers"], None),
    "no decoder with attention=cross": ({"attention": "cross"}, ["--to", "transformers"], None),
    "one class token, no registers": ({"registers": 2}, ["--to", "transformers"], None),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_no_such_autoencoder_is_one_line(words: str, tmp_path: Path) -> None:
    changes, options, without = WRONG[words]
    pretrained(tmp_path / "run", **changes)
    if without:
        shutil.rmtree(tmp_path / "run" / without)
    with pytest.raises(CheckpointError, match=words) as raised:
        main(["export", str(tmp_path / "run"), str(tmp_path / "out"), *options, "--decoder"])
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()

"""timm's models come in and ours go out: what timm loads by one line computes the same; there and back are the same bits."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

from vitssl.errors import CheckpointError
from vitssl.interop.parity import exactly
from vitssl.interop.source import import_weights
from vitssl.interop.timm import export_timm, import_timm
from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead
from vitssl.sections import EncoderConfig
from vitssl.train.export import encoder_facts

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": [16, 24], "patch_size": 4}


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def images(channels: int = 3) -> Tensor:
    return torch.randn(3, channels, 16, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


FOREIGN: dict[str, dict[str, Any]] = {  # what timm's models differ in
    "class token": {},
    "headless": {"num_classes": 0},
    "mean": {"global_pool": "avg", "fc_norm": False},
    "norm after pooling": {"global_pool": "avg"},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "layer scale, norm before": {"init_values": 0.1, "pre_norm": True, "qk_norm": True},
    "grey": {"in_chans": 1},
    "another activation": {"act_layer": "gelu_tanh"},
    "DINOv3": {"architecture": "vit_small_patch16_dinov3", "global_pool": "token"},
    "DINOv3, another temperature": {"architecture": "vit_small_patch16_dinov3", "rope_temperature": 50.0},
    "EVA-02 for one size, norm after pooling": {"architecture": "eva02_tiny_patch14_224"},
    "perception encoder": {"architecture": "vit_pe_core_tiny_patch16_384", "attn_pool_num_heads": 2},
    "perception encoder without a norm": {"architecture": "vit_pe_spatial_tiny_patch16_512", "num_classes": 0},
    "learned rotations": {"architecture": "vit_small_patch16_rope_mixed_224"},
    "BEiT": {"architecture": "beit_base_patch16_224", "num_classes": 0},
}


def folder_of_timm(folder: Path, **changes: Any) -> nn.Module:
    arguments = {**TINY, "num_classes": 5, **changes}
    model = shaken(timm.create_model(arguments.pop("architecture", "vit_tiny_patch16_224"), **arguments))
    data = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (arguments.get("in_chans", 3), 16, 24)}
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True, model_config={"pretrained_cfg": data})
    return model


@pytest.mark.parametrize("case", FOREIGN)
def test_what_timm_saved_computes_the_same(case: str, tmp_path: Path) -> None:
    model = folder_of_timm(tmp_path, **FOREIGN[case])
    found = import_weights(f"timm:{tmp_path}")
    channels = FOREIGN[case].get("in_chans", 3)
    assert found.facts["parity"] == 0 and found.encoder.spec.image_size == (16, 24)
    assert found.facts["mean"] == ([0.1, 0.2, 0.3] if channels == 3 else [pytest.approx(0.2)])
    pooled_by_class = ("token", "map") if model.cls_token is not None else ()
    assert found.facts["pooling"] == ("class" if model.global_pool in pooled_by_class else "mean")
    coverage = dict(found.coverage)
    assert sum(coverage.values()) == len(model.state_dict())
    with exactly(model, found.encoder):
        tokens = found.encoder(images(channels), last_blocks=1)
        if isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity):
            assert coverage["norm after pooling, now the final norm"] == 2
            pooled = found.encoder.norm(tokens.blocks[0].patches.mean(dim=1))
        else:
            pooled = tokens.pool("mean" if "avg" in model.global_pool else "class") if model.global_pool != "map" else None
        expected = model.forward_head(model.forward_features(images(channels)), pre_logits=True)
        if pooled is not None:
            one_size = hasattr(model, "rope") and not model.dynamic_img_size  # keeps its rotations in float32
            assert (pooled - expected).abs().max() < (1e-6 if one_size else 1e-12)


def ours(**changes: Any) -> tuple[Encoder, dict[str, Any]]:
    arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2} | changes.pop("arguments", {})
    pooling = changes.pop("pooling", "class")
    values = {"name": "vit_tiny_patch16_224", "image_size": [16, 24], "patch_size": 4, "arguments": arguments}
    section = EncoderConfig.model_validate(values | changes)
    encoder = shaken(Encoder.create(section.name, **section.model_dump(exclude={"name"})))
    facts = {"mean": [0.5] * section.channels, "std": [0.25] * section.channels, "pooling": pooling, "method": "mae", "step": 7}
    return encoder, encoder_facts(encoder, section, **facts)


OURS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean": {"pooling": "mean", "positions": "sincos"},
    "registers": {"registers": 2, "pooling": "mean"},
    "no class token, six channels": {"class_token": False, "channels": 6, "pooling": "mean"},
    "layer scale": {"arguments": {"init_values": 0.1}},
    "DINO's positions": {"pos_resample": "dino"},
    "DINOv3": {"name": "vit_small_patch16_dinov3", "registers": 3, "pooling": "mean"},
    "EVA-02": {"name": "eva02_tiny_patch14_224"},
    "BEiT": {"name": "beit_base_patch16_224", "pooling": "mean"},
}


@pytest.mark.parametrize("case", OURS)
def test_ours_go_out_and_come_back(case: str, tmp_path: Path) -> None:
    encoder, facts = ours(**OURS[case])
    assert export_timm(tmp_path / "out", encoder.state(), facts) < 1e-12
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == encoder.state().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in encoder.state().items())
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with exactly(model, encoder):
        pooled = encoder(images(encoder.spec.channels)).pool(facts["pooling"])
        assert (model(images(encoder.spec.channels)) - pooled).abs().max() < 1e-12
    found = import_timm(f"local-dir:{tmp_path / 'out'}")
    assert found.encoder.state().keys() == encoder.state().keys()
    assert all(torch.equal(tensor, encoder.state()[name]) for name, tensor in found.encoder.state().items())
    assert {key: found.facts[key] for key in ("mean", "std", "pooling")} == {
        key: facts[key] for key in ("mean", "std", "pooling")
    }
    assert found.encoder.pos_resample == encoder.pos_resample
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    card = (tmp_path / "out/README.md").read_text()
    assert "license: unknown  # fill in" in card and 'create_model("local-dir:out", pretrained=True)' in card
    assert ("its own rule, not by that of dino" in card) == (case == "DINO's positions")


@pytest.mark.parametrize("pooling", ["mean", "class"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_a_classifier_goes_out(name: str, pooling: str, tmp_path: Path) -> None:
    """As fine-tuning makes it, with the configuration and the numbers of its run."""
    encoder, facts = ours(name=name)
    head = shaken(
        ClassificationHead(16, 3, pooling=pooling, norm=encoder.drop_norm() if pooling == "mean" else False, init="zero")
    )
    facts = {key: facts[key] for key in ("architecture", "image_size", "mean", "std")} | {"pooling": pooling}
    facts |= {"arguments": encoder.arguments_with(head.arguments), "classes": ["cat", "dog", "hen"]}
    facts |= {"top1": 0.625, "run": "runs/x", "step": 20, "crop_pct": 0.7, "tested_size": [24, 32]}
    (tmp_path / "config.yaml").write_text("optim:\n  base_lr: 1e-3\n")
    (tmp_path / "probes.jsonl").write_text('{"step": 1, "top1": 0.1}\n{"step": 20, "top1": 0.625}\n{"step": 30, "top1": 0.5}\n')
    export_timm(tmp_path / "out", encoder.state() | head.state(), facts, run=tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with exactly(model, encoder, head):
        assert (model(images()) - head(encoder(images()))).abs().max() < 1e-12
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert resolve_model_data_config(model)["input_size"] == (3, 16, 24)
    tested = resolve_model_data_config(model, use_test_size=True)
    assert tested["input_size"] == (3, 24, 32) and math.floor(24 / tested["crop_pct"]) == round(24 / 0.7)
    assert math.floor(16 / resolve_model_data_config(model)["crop_pct"]) == round(16 / 0.7) == 23  # 22 of 0.7 itself
    assert config["label_names"] == ["cat", "dog", "hen"] and config["num_classes"] == model.num_classes == 3
    card = (tmp_path / "out/README.md").read_text()
    assert "top-1: 62.50%" in card and "step: 20" in card and "  base_lr: 1e-3" in card and "classes: 3" in card
    assert "top1: 0.5" not in card and "judged: at 24 x 32 pixels, the central 70.0% of the shorter side" in card


def test_what_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, facts = ours()
    monkeypatch.setattr(Encoder, "forward", lambda self, images: _louder(self, images))
    with pytest.raises(CheckpointError, match=r"its outputs differ from the original's by 5\.0e-01 of their size, where 1e-07"):
        export_timm(tmp_path / "out", encoder.state(), facts)
    assert not list(tmp_path.iterdir())


_forward = Encoder.forward


def _louder(encoder: Encoder, images: Tensor) -> Any:
    tokens = _forward(encoder, images)
    return type(tokens)(2 * tokens.prefix, 2 * tokens.patches)


WRONG = {
    "cannot load nosuch: .*Unknown model .nosuch.; give a tag": lambda folder: "nosuch",
    "cannot load vit_tiny_patch16_224.no: .*tag .no.": lambda folder: "vit_tiny_patch16_224.no",
    "cannot load test_vit4: .*No pretrained weights exist": lambda folder: "test_vit4",
    "cannot load local-dir:.*Config file not found": lambda folder: str(folder),
    "is a ResNet; only timm's plain VisionTransformer, Eva and Beit are read": lambda folder: _resnet(folder),
    "config.json cannot be read: Expecting value": lambda folder: _broken(folder),
}


def _broken(folder: Path) -> str:
    (folder / "config.json").write_text("x")
    return str(folder)


def _resnet(folder: Path) -> str:
    save_for_hf(timm.create_model("resnet18", num_classes=2), folder, safe_serialization=True)
    return str(folder)


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_come_in_is_one_line(words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as raised:
        import_timm(WRONG[words](tmp_path))
    assert "\n" not in str(raised.value)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    encoder, facts = ours()
    (tmp_path / "mine").write_text("x")
    with pytest.raises(CheckpointError, match=r"is there already and is left as it is; give the name of a new folder"):
        export_timm(tmp_path, encoder.state(), facts)
    with pytest.raises(CheckpointError, match=r"mine/new could not be written: Not a directory"):
        export_timm(tmp_path / "mine" / "new", encoder.state(), facts)
    with pytest.raises(CheckpointError, match=r"^timm:x: says its format and heads itself"):
        import_weights("timm:x", heads=3)
    (tmp_path / "empty").mkdir()
    assert export_timm(tmp_path / "empty", encoder.state(), facts) < 1e-12

"""ONNX files give in onnxruntime what torch gives, for several batch sizes and image sizes, encoders and classifiers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitssl.errors import CheckpointError
from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead
from vitssl.sections import EncoderConfig
from vitssl.train.export import encoder_facts

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra vitssl[onnx] is not installed")
pytest.importorskip("onnxscript", reason="the extra vitssl[onnx] is not installed")
from vitssl.interop import onnx as ours  # noqa: E402
from vitssl.interop.onnx import export_onnx  # noqa: E402

JUDGED = {"crop_pct": 0.7, "tested_size": [24, 24], "labels": "one", "decoding": {"exif": True}}


def encoder(**changes: Any) -> tuple[Encoder, dict[str, Any]]:
    torch.manual_seed(0)
    pooling = changes.pop("pooling", "class")
    values = {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4}
    section = EncoderConfig.model_validate(values | {"arguments": {"embed_dim": 16, "depth": 1, "num_heads": 2}} | changes)
    made = Encoder.create(section.name, **section.model_dump(exclude={"name"})).eval()
    shake(made)
    facts = {"mean": [0.5] * section.channels, "std": [0.25] * section.channels, "pooling": pooling}
    return made, encoder_facts(made, section, **facts)


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def run(folder: Path, images: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


ENCODERS: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {  # and the image sizes to try
    "timm's positions": ({}, [(16, 16), (24, 32), (12, 8)]),
    "MAE's, oblong, no class token": (
        {"pos_resample": "mae", "image_size": [16, 24], "class_token": False, "pooling": "mean", "channels": 2},
        [(16, 24), (32, 32)],
    ),
    "DINO's, registers": ({"pos_resample": "dino", "registers": 2}, [(16, 16)]),
    "DINOv3": ({"name": "vit_small_patch16_dinov3"}, [(16, 16)]),
    "BEiT": ({"name": "beit_base_patch16_224"}, [(16, 16)]),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_at_several_sizes(case: str, tmp_path: Path) -> None:
    changes, sizes = ENCODERS[case]
    model, facts = encoder(**changes)
    assert export_onnx(tmp_path / "out", model.state(), facts) < 5e-6
    for size in sizes:
        for num in (1, 5):
            images = torch.randn(num, model.spec.channels, *size)
            with torch.no_grad():
                expected = model(images)
            tokens, features = run(tmp_path / "out", images)
            assert far(tokens, torch.cat([expected.prefix, expected.patches], dim=1)) < 5e-6
            assert far(features, expected.pool(facts["pooling"])) < 5e-6
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["any_image_size"] == (len(sizes) > 1) and config["outputs"] == ["tokens", "features"]
    if case == "DINO's, registers":
        with pytest.raises(CheckpointError, match=r"^here: onnxruntime cannot run what was written: .*nothing was written"):
            pooled = ours.Pooled(model, facts["pooling"])
            ours._compare(ours._session(tmp_path / "out/model.onnx"), pooled, torch.randn(1, 3, 24, 24), what="here")
    card = (tmp_path / "out/README.md").read_text()
    assert ("16 x 16 pixels alone" in card) == (len(sizes) == 1) and "tokens, features = session.run" in card


def classifier(pooling: str) -> tuple[Encoder, ClassificationHead, dict[str, Any]]:
    """As fine-tuning exports one."""
    body, facts = encoder()
    head = ClassificationHead(16, 3, pooling=pooling, norm=body.drop_norm() if pooling == "mean" else False).eval()
    shake(head)
    facts = {key: facts[key] for key in ("architecture", "image_size", "mean", "std")} | {"pooling": pooling}
    return body, head, facts | {"arguments": body.arguments_with(head.arguments), "classes": ["cat", "dog", "hen"], **JUDGED}


def test_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, head, facts = classifier("mean")
    images, compared, compare = torch.randn(4, 3, 20, 16), [], ours._compare
    monkeypatch.setattr(ours, "_compare", lambda *rest, **said: compared.append(rest[2]) or compare(*rest, **said))
    assert export_onnx(tmp_path / "out", body.state() | head.state(), facts, images=images) < 5e-6
    assert [len(each) for each in compared] == [1, 3, 2, 4] and compared[-1] is images
    with torch.no_grad():
        assert far(run(tmp_path / "out", images)[0], head(body(images))) < 5e-6
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["classes"] == ["cat", "dog", "hen"] and JUDGED.items() <= said.items()


def test_what_differs_or_breaks_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, facts = encoder(pos_resample="dino")  # of one size, which is quicker

    def other(network: nn.Module, file: Path, *rest: Any, **options: Any) -> None:
        with torch.no_grad():
            network.encoder.vit.norm.bias += 0.5
        write(network, file, *rest, **options)
        with torch.no_grad():
            network.encoder.vit.norm.bias -= 0.5

    write = ours._write
    monkeypatch.setattr(ours, "_write", other)
    with pytest.raises(CheckpointError, match=r"1 images of .16, 16.: its outputs differ from the original's by .* 5e-05"):
        export_onnx(tmp_path / "out", model.state(), facts)
    monkeypatch.setattr(ours, "_write", lambda network, file, *rest, **options: file.write_bytes(b"x"))
    with pytest.raises(CheckpointError, match=r"onnxruntime .* cannot read what was written: "):
        export_onnx(tmp_path / "out", model.state(), facts)
    monkeypatch.setattr(ours, "_write", write)
    monkeypatch.setattr(ours.torch.onnx, "export", lambda *rest, **options: 1 / 0)
    with pytest.raises(CheckpointError, match=r"torch .* cannot make ONNX of this network: ZeroDivisionError"):
        export_onnx(tmp_path / "out", model.state(), facts)
    assert not list(tmp_path.iterdir())

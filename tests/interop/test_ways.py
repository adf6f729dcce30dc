"""``vitssl import`` and ``vitssl export`` from end to end: a file comes in, goes out to everyone, and comes back."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from vitssl.cli import main
from vitssl.errors import CheckpointError
from vitssl.models.encoder import Encoder
from vitssl.report import program
from vitssl.sections import EncoderConfig
from vitssl.train.export import encoder_facts, load_encoder, write_export

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def mae_file(tmp_path: Path) -> Path:
    """As the official code writes it."""
    weights = load_file(GOLDEN / "mae/weights.safetensors")
    torch.save({"model": {name: t for name, t in weights.items() if not name.startswith("ft.")}}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth"


def test_a_file_comes_in_and_timm_reads_it(mae_file: Path, capsys: pytest.CaptureFixture) -> None:
    out = mae_file.parent / "out"
    heads = json.loads((GOLDEN / "mae/meta.json").read_text())["config"]["heads"]
    assert main(["import", str(mae_file), str(out), "--heads", str(heads)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    num = sum("decoder" not in name and name != "mask_token" for name in torch.load(mae_file, weights_only=True)["model"])
    assert "as mae writes them" in said and f"encoder {num} tensors" in said and "left over 0 tensors" in said
    assert f"python -m finetune encoder={out}" in said
    facts = json.loads((out / "encoder.json").read_text())
    model = timm.create_model(facts["architecture"], **facts["arguments"], checkpoint_path=str(out / "encoder.safetensors"))
    encoder, _ = load_encoder(out)
    assert all(torch.equal(tensor, encoder.state()[name]) for name, tensor in model.state_dict().items())
    assert facts["encoder"]["pos_resample"] == "mae" and facts["pooling"] == "mean" and facts["format"] == "mae"


def exported(folder: Path) -> Encoder:
    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    values = {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "arguments": arguments}
    section = EncoderConfig.model_validate(values)
    encoder = Encoder.create(section.name, **section.model_dump(exclude={"name"}))
    facts = encoder_facts(encoder, section, mean=[0.5] * 3, std=[0.2] * 3, pooling="class", method="dino", run="x", step=3)
    write_export(folder / "export", "encoder", encoder.state(), facts)
    return encoder


@pytest.mark.parametrize("way, prefix", [("timm", "timm:"), ("transformers", "hf:")])
def test_there_and_back_by_the_tools(way: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if way != "timm":
        pytest.importorskip(way, reason=f"the extra vitssl[{way}] is not installed")
    encoder = exported(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("seed: 77\n")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", way]) == 0
    said = capsys.readouterr().out
    assert "outputs differ by" in said and "README.md, config.json, model.safetensors" in said
    assert "seed: 77" in (tmp_path / "out/README.md").read_text()
    assert main(["import", f"{prefix}{tmp_path / 'out'}", str(tmp_path / "back")]) == 0
    said = capsys.readouterr().out
    assert f"as {way} writes them" in said and "outputs differ by" in said
    state, facts = load_encoder(tmp_path / "back")[0].state(), json.loads((tmp_path / "back/encoder.json").read_text())
    assert all(torch.equal(state[name], tensor) for name, tensor in encoder.state().items())
    assert facts["pooling"] == "class" and facts["mean"] == [0.5] * 3


@pytest.mark.parametrize("way", ["timm", "transformers"])
def test_real_images_are_compared_too(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "timm":
        pytest.importorskip(way, reason=f"the extra vitssl[{way}] is not installed")
    exported(tmp_path / "run")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 20, 200)).save(tmp_path / "photos" / f"{number}.png")
    seen, forward = [], Encoder.forward

    def watched(self: Encoder, images: torch.Tensor, **options: Any) -> Any:
        seen.append(images)
        return forward(self, images, **options)

    monkeypatch.setattr(Encoder, "forward", watched)
    options = ["--to", way, "--images", str(tmp_path / "photos")]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), *options]) == 0
    real = seen[-1][-3:]
    assert [round(float(pixels[0].mean()), 2) for pixels in real] == [-2.5, -0.93, 0.64]  # (80 n / 255 - 0.5) / 0.2


def test_a_fine_tuned_run_gives_its_last_classifier(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encoder = exported(tmp_path / "run")
    facts = json.loads((tmp_path / "run/export/encoder.json").read_text())
    facts |= {"arguments": facts["arguments"] | {"num_classes": 2}, "classes": ["a", "b"]}
    head = {"head.weight": torch.ones(2, 16), "head.bias": torch.zeros(2)}
    write_export(tmp_path / "run/export/last", "classifier", encoder.state() | head, facts)
    for number, place in enumerate(("run", "run/export", "run/export/last", "run/export/last/classifier.safetensors")):
        assert main(["export", str(tmp_path / place), str(tmp_path / f"out{number}"), "--to", "timm"]) == 0
        assert "classifier" in capsys.readouterr().out
        assert json.loads((tmp_path / f"out{number}/config.json").read_text())["label_names"] == ["a", "b"]
    assert main(["export", str(tmp_path / "run/export/encoder.safetensors"), str(tmp_path / "out"), "--to", "timm"]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["num_classes"] == 0


@pytest.mark.parametrize(
    "argv, words",
    [
        (["import", "nowhere.pth", "OUT"], "nowhere.pth does not exist"),
        (["import", "FILE", "OUT", "--format", "bert"], "--format bert: is none of mae, moco_v3"),
        (["import", "FILE", "OUT"], "does not say how many heads there are; say it with --heads"),
        (["import", "hf:nowhere", "OUT"], "nowhere/config.json: No such file"),
        (["export", "nowhere", "OUT", "--to", "timm"], "nowhere/encoder.safetensors does not exist"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    argv: list[str], words: str, mae_file: Path, capfd: pytest.CaptureFixture
) -> None:
    if "hf:" in argv[1]:
        pytest.importorskip("transformers", reason="the extra vitssl[transformers] is not installed")
    out = mae_file.parent / "out"
    assert program(main, [{"FILE": str(mae_file), "OUT": str(out)}.get(word, word) for word in argv]) == 2
    said = capfd.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("module, extra", [("transformers", "transformers"), ("onnxruntime", "onnx"), ("onnxscript", "onnx")])
def test_what_is_not_installed_is_named(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if module == "onnxscript":
        pytest.importorskip("onnxruntime", reason="the extra vitssl[onnx] is not installed")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"vitssl.interop.{extra}", raising=False)
    with pytest.raises(CheckpointError, match=rf"^{module} is not installed: pip install 'vitssl\[{extra}\]'$"):
        importlib.import_module(f"vitssl.interop.{extra}")

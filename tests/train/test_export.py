"""Exports: written whole, read strictly, refused in one line, and two lines of plain timm."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import SafetensorError

import vitssl
from vitssl.errors import CheckpointError, ConfigError
from vitssl.models.encoder import Encoder
from vitssl.sections import EncoderConfig
from vitssl.train import export
from vitssl.train.export import (
    encoder_facts,
    encoder_like,
    fill_encoder,
    load_encoder,
    newest_export,
    read_export,
    read_facts,
    write_export,
)

KINDS = {
    "sincos": {"positions": "sincos", "weights_init": "mae"},
    "registers": {"registers": 2, "pos_resample": "dino"},
    "no class token, oblong, grey": {"class_token": False, "image_size": [24, 16], "channels": 1},
}
FACTS = {
    "architecture": "a",
    "arguments": {},
    "image_size": [8, 8],
    "mean": [0.5],
    "std": [0.5],
    "pooling": "mean",
    "encoder": {},
}


def section(**changes) -> EncoderConfig:
    values = {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4}
    return EncoderConfig.model_validate(values | {"arguments": {"embed_dim": 16, "depth": 2, "num_heads": 2}} | changes)


def export_to(folder: Path, *, seed: int = 0, **changes) -> Encoder:
    torch.manual_seed(seed)
    config = section(**changes)
    encoder = Encoder.create(config.name, **config.model_dump(exclude={"name"}))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    facts = encoder_facts(encoder, config, mean=[0.5], std=[0.5], pooling="mean", method="mae", run="runs/x", step=3)
    write_export(folder, "encoder", encoder.state(), facts)
    return encoder.eval()


def images(encoder: Encoder) -> torch.Tensor:
    return torch.randn(2, encoder.spec.channels, *encoder.spec.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_two_lines_of_plain_timm(changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = export_to(tmp_path / "export", **changes)
    monkeypatch.chdir(tmp_path)

    facts = json.load(open("export/encoder.json"))  # noqa: SIM115 (the line of the README)
    model = timm.create_model(facts["architecture"], **facts["arguments"], checkpoint_path="export/encoder.safetensors")

    tokens = encoder(images(encoder))
    expected = torch.cat([tokens.prefix, tokens.patches], dim=1)
    torch.testing.assert_close(model.eval().forward_features(images(encoder)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("named", ["run", "export", "file"])
def test_an_encoder_comes_back_as_it_was(changes: dict, named: str, tmp_path: Path):
    encoder = export_to(tmp_path / "export", **changes)
    path = {"run": tmp_path, "export": tmp_path / "export", "file": tmp_path / "export" / "encoder.safetensors"}[named]
    again, facts = vitssl.load_encoder(path)
    assert facts["pooling"] == "mean" and facts["step"] == 3 and facts["image_size"] == list(encoder.spec.image_size)
    assert (again.spec, again.pos_resample) == (encoder.spec, encoder.pos_resample)
    state = again.state()
    assert all(torch.equal(state.pop(name), tensor) for name, tensor in encoder.state().items()) and not state
    assert again.vit.pos_embed.requires_grad, "in fine-tuning positions are trained"
    assert torch.equal(again.eval()(images(encoder)).patches, encoder(images(encoder)).patches)


def test_weights_are_written_in_fp32_and_readable_like_the_rest(tmp_path: Path):
    write_export(tmp_path, "encoder", {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(4, 4).T}, FACTS)
    write_export(tmp_path, "encoder", {"a": torch.zeros(3, dtype=torch.bfloat16)}, FACTS)
    state, _ = read_export(tmp_path)
    assert state["a"].dtype == torch.float32 and list(state) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "encoder.json", "encoder.safetensors"]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_another_image_size_resamples_positions(tmp_path: Path):
    encoder = export_to(tmp_path, pos_resample="mae")
    bigger, _ = load_encoder(tmp_path, image_size=[24, 32], drop_path=0.2)
    assert bigger.spec.grid == (6, 8)
    other = Encoder.create(
        "vit_tiny_patch16_224", **section(image_size=[24, 32], pos_resample="mae").model_dump(exclude={"name"})
    )
    other.load_state(encoder.state(), resample=True)
    assert torch.equal(bigger.state()["pos_embed"], other.state()["pos_embed"])
    assert torch.equal(bigger.state()["blocks.0.mlp.fc1.weight"], encoder.state()["blocks.0.mlp.fc1.weight"])


def test_a_dropped_norm_is_left_out(tmp_path: Path):
    export_to(tmp_path)
    encoder, _ = encoder_like(tmp_path)
    encoder.drop_norm()
    fill_encoder(encoder, tmp_path)
    assert torch.equal(encoder.state()["blocks.1.norm2.weight"], read_export(tmp_path)[0]["blocks.1.norm2.weight"])


def test_encoder_like_is_fresh(tmp_path: Path):
    encoder = export_to(tmp_path)
    assert not torch.equal(
        encoder_like(tmp_path)[0].state()["blocks.0.mlp.fc1.weight"], encoder.state()["blocks.0.mlp.fc1.weight"]
    )


def test_what_pretraining_froze_is_trained_afterwards(tmp_path: Path):
    """MoCo v3's positions and patches; its positions are in the rows' order, and come along as they are."""
    frozen = {"positions": "sincos_moco_v3", "freeze_patch_embed": True, "drop_path": 0.2, "drop_path_shape": "uniform"}
    encoder = export_to(tmp_path, **frozen)
    again, _ = load_encoder(tmp_path, drop_path=0.1)
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert not all(parameter.requires_grad for parameter in encoder.parameters())
    assert torch.equal(again.state()["pos_embed"], encoder.state()["pos_embed"])
    assert isinstance(again.vit.blocks[0].drop_path1, torch.nn.Identity)


def rewrite(path: Path, **changes) -> None:
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda f: (f / "encoder.safetensors").unlink(), r"encoder.safetensors does not exist; give a run's folder"),
    "no words": (lambda f: (f / "encoder.json").unlink(), r"encoder.json does not exist; give a run's folder"),
    "half the weights": (lambda f: os.truncate(f / "encoder.safetensors", 500), r"encoder.safetensors is damaged: .*export it"),
    "no header": (lambda f: os.truncate(f / "encoder.safetensors", 3), r"encoder.safetensors is damaged"),
    "half the words": (lambda f: os.truncate(f / "encoder.json", 50), r"encoder.json is damaged: .*; export it again"),
    "no text": (lambda f: (f / "encoder.json").write_bytes(b"\xff"), r"encoder.json is damaged"),
    "a list": (lambda f: (f / "encoder.json").write_text("3"), r"encoder.json lacks architecture, arguments"),
    "two facts missing": (lambda f: rewrite(f / "encoder.json", mean=None, pooling=None), r"lacks mean, pooling; export it"),
    "no section": (lambda f: rewrite(f / "encoder.json", encoder=None), r"encoder.json lacks encoder; export it again"),
    "another network": (
        lambda f: write_export(f, "encoder", {"a": torch.ones(1)}, read_facts(f)),
        r"these weights do not fit vit_tiny_patch16_224: \d+ missing \(.*\); 1 unexpected \(a\)",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(damage: Callable[[Path], None], message: str, tmp_path: Path):
    export_to(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_encoder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_change_that_cannot_be_is_a_config_error(tmp_path: Path):
    export_to(tmp_path)
    with pytest.raises(ConfigError, match=r"drop_path=2: input should be less than or equal to 1 \(in .*"):
        encoder_like(tmp_path, drop_path=2)
    with pytest.raises(ConfigError, match=r"18x18 is not divisible by patches of 4x4; nearest: 16x16"):
        encoder_like(tmp_path, image_size=18)


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(28, "No space left")]
)
def test_a_full_disk_leaves_the_earlier_export(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = export_to(tmp_path)

    def fail(*arguments):
        raise error

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"encoder.safetensors could not be written: .*No space left.*; free space"):
        export_to(tmp_path, seed=1)
    assert torch.equal(read_export(tmp_path)[0]["cls_token"], encoder.state()["cls_token"])


def test_the_newest_export(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no encoder was exported below .*; run python -m pretrain first"):
        newest_export(tmp_path / "runs")
    for age, name in [(30, "a"), (10, "b"), (20, "c")]:
        weights = write_export(tmp_path / "runs" / name / "export", "encoder", {"a": torch.ones(1)}, FACTS)
        os.utime(weights, (1e9 - age, 1e9 - age))
    write_export(tmp_path / "runs" / "d" / "export" / "last", "classifier", {"a": torch.ones(1)}, FACTS)
    assert newest_export(tmp_path / "runs") == tmp_path / "runs" / "b" / "export"


def test_the_card_beside_an_export_quotes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "runs/x"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 77\n")
    (run / "probes.jsonl").write_text('{"step": 1, "knn": 0.1}\n{"step": 3, "knn": 0.25}\n')
    monkeypatch.chdir(tmp_path)
    export_to(run / "export")
    card = (run / "export/README.md").read_text()
    for line in ("license: unknown", "seed: 77", "knn: 0.25", "method: mae", 'checkpoint_path="encoder.safetensors"'):
        assert line in card

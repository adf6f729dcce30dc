"""transformers' networks become encoders and ours become theirs: the same outputs in float64, the same bits there and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import functional as TF

from vitssl.errors import CheckpointError
from vitssl.interop.official import Imported
from vitssl.interop.ours import tokens_of
from vitssl.interop.parity import difference, exactly
from vitssl.models.encoder import Encoder
from vitssl.sections import EncoderConfig
from vitssl.train.export import encoder_facts

transformers = pytest.importorskip("transformers", reason="the extra vitssl[transformers] is not installed")
from vitssl.interop.transformers import export_transformers, import_transformers  # noqa: E402

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
MLP = {"intermediate_size": 48}
DECODER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DECODER = {f"decoder_{key}": value for key, value in DECODER.items()}
SHARED = {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTModel", MLP),
    "ViT, no bias, one channel": ("ViTModel", MLP | {"qkv_bias": False, "num_channels": 1}),
    "ViT, tanh": ("ViTModel", MLP | {"hidden_act": "gelu_pytorch_tanh"}),
    "ViT classifier": ("ViTForImageClassification", MLP | {"num_labels": 3}),
    "ViT in pretraining": ("ViTForMaskedImageModeling", MLP | {"encoder_stride": 4}),
    "ViTMAE": ("ViTMAEModel", MLP),
    "ViTMAE with its decoder": ("ViTMAEForPreTraining", MLP | DECODER),
    "DINOv2": ("Dinov2Model", {"mlp_ratio": 3}),
    "DINOv2, scale of 1": ("Dinov2Model", {"mlp_ratio": 4, "layerscale_value": 1.0}),
    "DINOv2, gated": ("Dinov2Model", {"mlp_ratio": 4, "use_swiglu_ffn": True}),
    "DINOv2, registers": ("Dinov2WithRegistersModel", {"mlp_ratio": 4, "num_register_tokens": 3}),
    "DINOv2 classifier": ("Dinov2ForImageClassification", {"mlp_ratio": 4, "num_labels": 3}),
    "I-JEPA": ("IJepaModel", MLP),
    "DINOv3": ("DINOv3ViTModel", MLP | {"num_register_tokens": 2, "key_bias": False}),
    "DINOv3, gated, no bias, another base": (
        "DINOv3ViTModel",
        MLP | {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False, "rope_theta": 50.0},
    ),
    "DINOv3, a bias of keys": ("DINOv3ViTModel", MLP | {"key_bias": True, "num_register_tokens": 1}),
    "BEiT": ("BeitModel", MLP | {"use_relative_position_bias": True}),
    "BEiT in pretraining": ("BeitForMaskedImageModeling", MLP | SHARED | {"use_mask_token": True, "vocab_size": 8}),
    "BEiT classifier": ("BeitForImageClassification", MLP | {"use_relative_position_bias": True, "num_labels": 3}),
    "data2vec": ("Data2VecVisionModel", MLP | SHARED | {"use_relative_position_bias": True}),
    "data2vec classifier": ("Data2VecVisionForImageClassification", MLP | SHARED | {"num_labels": 3}),
}
POOLED = {"Data2VecVisionModel": {"add_pooling_layer": True}}  # else its norm has no place


def made(name: str, seed: int = 0, **values: Any) -> nn.Module:
    """One of transformers' networks, every weight random but a layer scale of 1, which says that there is none."""
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**SMALL, **values), **POOLED.get(name, {})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lambda1" not in key or "layerscale_value" not in values:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def seen(model: nn.Module, images: Tensor, **options: Any) -> Tensor:
    """Tokens after the final norm, in their own order."""
    body = getattr(model, model.base_model_prefix, model) if model.base_model_prefix in ("vit", "dinov2", "beit") else model
    body = getattr(model, "data2vec_vision", body)
    if body.config.model_type == "vit_mae":
        body.config.mask_ratio = 0.0
        options["noise"] = torch.arange(16, dtype=images.dtype).expand(len(images), -1)
    found = body(images, **options).last_hidden_state
    norm = model.layernorm if hasattr(model, "lm_head") else getattr(getattr(body, "pooler", None), "layernorm", None)
    return found if norm is None else norm(found)


def with_epsilon(model: nn.Module, epsilon: float) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = epsilon
    return model


def images(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("case", MODELS)
def test_what_is_read_computes_the_same(case: str, tmp_path: Path) -> None:
    name, values = MODELS[case]
    model = made(name, **values)
    model.save_pretrained(tmp_path)
    found = import_transformers(tmp_path)
    assert not transformers.logging.get_logger("transformers.modeling_utils").isEnabledFor(30)  # nor are its tables shown
    encoder, channels = found.encoder, values.get("num_channels", 3)
    # the class token's sum with its position is float32 here, and so are rotations
    bound = 1e-7 if "registers" in case else 1e-6 if "DINOv3" in case else 1e-12
    assert found.facts["parity"] < bound and dict(found.coverage)["encoder"] > 30
    epsilon = 1e-5 if "DINOv3" in case else 1e-6
    assert ("norm_epsilon" in found.facts) == (model.config.layer_norm_eps != epsilon)
    with exactly(with_epsilon(model, epsilon), encoder):
        assert difference(tokens_of(encoder, images(channels)), seen(model, images(channels))) < bound
        options = {} if model.config.model_type.startswith("dino") else {"interpolate_pos_encoding": True}
        if model.config.model_type not in ("vit_mae", "beit", "data2vec-vision"):  # other sizes, by their own rule
            larger = images(channels, 24)
            assert difference(tokens_of(encoder, larger), seen(model, larger, **options)) < 1e-6


def facts_of(encoder: Encoder, section: EncoderConfig, **facts: Any) -> dict[str, Any]:
    channels = encoder.spec.channels
    return encoder_facts(encoder, section, **{"mean": [0.5] * channels, "std": [0.25] * channels, "pooling": "mean"} | facts)


def back(found: Imported) -> dict[str, Tensor]:
    return found.encoder.state()


@pytest.mark.parametrize("case", MODELS)
def test_there_and_back_are_the_same_bits(case: str, tmp_path: Path) -> None:
    """Theirs, ours, theirs, ours: encoders never change, and neither does what transformers itself wrote."""
    name, values = MODELS[case]
    made(name, **values).save_pretrained(tmp_path / "theirs")
    once = import_transformers(tmp_path / "theirs")
    facts = facts_of(once.encoder, once.section, **{key: once.facts[key] for key in ("mean", "std", "pooling")})
    assert export_transformers(tmp_path / "again", once.encoder.state(), facts) < (1e-6 if "DINOv3" in case else 1e-12)
    twice = import_transformers(tmp_path / "again")
    assert "norm_epsilon" not in twice.facts and twice.facts["mean"] == once.facts["mean"]
    assert twice.section.model_dump(exclude={"pos_resample"}) == once.section.model_dump(exclude={"pos_resample"})
    assert back(once).keys() == back(twice).keys()
    assert all(torch.equal(tensor, back(twice)[key]) for key, tensor in back(once).items())
    first, second = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    if case in (
        "ViT",
        "I-JEPA",
        "DINOv2",
        "DINOv2, gated",
        "DINOv3",
    ):  # of the same kind; a registers' class token is a sum by now
        same = {key for key in second if not key.endswith("mask_token")}
        assert same and all(torch.equal(second[key], first[key]) for key in same)


OURS = {
    "plain": {},
    "oblong": {"image_size": [16, 24]},
    "no class token": {"class_token": False},
    "registers with positions": {"registers": 2},
    "registers without": {"registers": 2, "arguments": {"no_embed_class": True}},
    "layer scale": {"arguments": {"init_values": 0.3}},
    "sincos, DINO's positions": {"positions": "sincos", "pos_resample": "dino"},
    "rotations": {"name": "vit_small_patch16_dinov3", "registers": 1, "image_size": [16, 24]},
    "rotations, gated": {"name": "vit_small_plus_patch16_dinov3_qkvb", "arguments": {"swiglu_align_to": 2}},
    "relative positions": {"name": "beit_base_patch16_224"},
}


def ours(seed: int = 0, **changes: Any) -> tuple[Encoder, EncoderConfig]:
    torch.manual_seed(seed)
    arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2} | changes.pop("arguments", {})
    values = {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "arguments": arguments}
    section = EncoderConfig.model_validate(values | changes)
    encoder = Encoder.create(section.name, **section.model_dump(exclude={"name"}))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.eval(), section


@pytest.mark.parametrize("case", OURS)
def test_ours_go_out(case: str, tmp_path: Path) -> None:
    encoder, section = ours(**OURS[case])
    # tokens' sums with their positions are float32 there, and so are rotations
    bound = 1e-7 if "with positions" in case or "rotations" in case else 1e-12
    assert export_transformers(tmp_path / "out", encoder.state(), facts_of(encoder, section)) < bound
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["layer_norm_eps"] == (1e-5 if "rotations" in case else 1e-6)
    card = (tmp_path / "out/README.md").read_text()
    assert "license: unknown  # fill in" in card and f'{config["architectures"][0]}.from_pretrained("out")' in card
    assert not list(tmp_path.glob(".*"))
    found = import_transformers(tmp_path / "out")
    assert found.facts["pooling"] == "mean" and found.section.pos_resample == section.pos_resample  # as it was noted there
    assert found.encoder.spec.grid == encoder.spec.grid
    if "with positions" not in case:  # there two tensors were added
        state = found.encoder.state()
        assert state.keys() == encoder.state().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in encoder.state().items())


def classifier(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As finetune exports one."""
    arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": [16, 16], "patch_size": 4, "num_classes": 3}
    arguments |= {"global_pool": "token", "fc_norm": False, "final_norm": True} | changes
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    pooling = {"token": "class", "avg": "mean"}[arguments["global_pool"]]
    nn.init.normal_(model.head.weight)
    facts = {"architecture": "vit_tiny_patch16_224", "arguments": arguments, "image_size": [16, 16], "pooling": pooling}
    facts |= {"mean": [0.5] * 3, "std": [0.5] * 3, "classes": ["cat", "dog", "hen"], "top1": 0.5, "crop_pct": 0.8}
    return model.state_dict(), facts


def test_a_classifier_goes_out(tmp_path: Path) -> None:
    state, facts = classifier()
    assert export_transformers(tmp_path / "out", state, facts) < 1e-12
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "hen"} and model.config.label2id["hen"] == 2
    for parameter, name in ((model.classifier.weight, "head.weight"), (model.vit.embeddings.cls_token, "cls_token")):
        assert torch.equal(parameter, state[name])
    assert "top-1: 50.00%" in (tmp_path / "out/README.md").read_text()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_std) == [0.5] * 3
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    expected = TF.center_crop(TF.resize(image, 20, TF.InterpolationMode.BICUBIC), [16, 16]) / 127.5 - 1
    assert float((processor(image, return_tensors="pt")["pixel_values"][0] - expected).abs().mean()) < 0.01


CANNOT = {
    "the mean over patches": lambda: classifier(global_pool="avg", fc_norm=True),
    "no place for norm_pre.weight": lambda: _encoder(arguments={"pre_norm": True}),
    "no place for blocks.0.attn.q_norm.weight": lambda: _encoder(arguments={"qk_norm": True}),
    "registers or layer scale that lacks a class token": lambda: _encoder(class_token=False, registers=1),
    "has no MLP of 40 for a width of 16": lambda: _encoder(arguments={"init_values": 0.3, "mlp_ratio": 2.5}),
    "differ from the original's by": lambda: _encoder(arguments={"act_layer": "relu"}),
    "classifies with plain ViTs alone": lambda: classifier(init_values=1e-5),
    "no place for pos_embed": lambda: _encoder(name="eva_giant_patch14_224", arguments={"init_values": 0.1}),
    "differ from the original's by .*e": lambda: _encoder(
        name="vit_medium_patch16_rope_reg1_gap_256", class_token=True, arguments={"mlp_ratio": 3.0}
    ),
}


def _encoder(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    encoder, section = ours(**changes)
    return encoder.state(), facts_of(encoder, section)


@pytest.mark.parametrize("words", CANNOT)
def test_what_transformers_cannot_compute_is_not_written(words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as raised:
        export_transformers(tmp_path / "out", *CANNOT[words]())
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_a_version_that_builds_no_such_network_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(**values: Any) -> None:
        raise TypeError("Field 'patch_size' is\nanother one")

    monkeypatch.setattr(transformers.ViTModel, "config_class", refusing)
    with pytest.raises(
        CheckpointError, match=r"^transformers \d.* cannot build a ViTModel: TypeError Field 'patch_size' is another"
    ):
        export_transformers(tmp_path / "out", *_encoder())


def _edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def _drop(folder: Path, name: str, **more: Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({key: tensor for key, tensor in state.items() if name not in key} | more, folder / "model.safetensors")


DAMAGE = {
    "config.json: No such file": lambda folder: (folder / "config.json").unlink(),
    "config.json: is damaged": lambda folder: (folder / "config.json").write_text("{"),
    "model of type 'bert'; those that are read: vit, vit_mae": lambda folder: _edit(folder, model_type="bert"),
    "activation is quick_gelu; those that are read: gelu": lambda folder: _edit(folder, hidden_act="quick_gelu"),
    "epsilon that timm's do not have": lambda folder: _edit(folder, layer_norm_eps=0.5),
    "1 missing .layernorm.bias": lambda folder: _drop(folder, "layernorm.bias"),
    "1 unexpected .embeddings.extra": lambda folder: _drop(folder, "@", **{"embeddings.extra": torch.ones(1)}),
    "cannot load": lambda folder: (folder / "model.safetensors").unlink(),
    "cannot load .*: SafetensorError": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_what_cannot_be_read_is_one_line(words: str, tmp_path: Path) -> None:
    made("ViTModel", **MLP).save_pretrained(tmp_path)
    DAMAGE[words](tmp_path)
    with pytest.raises(CheckpointError, match=words) as raised:
        import_transformers(tmp_path)
    assert "\n" not in str(raised.value)


def test_statistics_are_those_of_the_image_processor(tmp_path: Path) -> None:
    made("ViTModel", **MLP).save_pretrained(tmp_path)
    assert import_transformers(tmp_path).facts["mean"] == [0.5] * 3
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3).save_pretrained(tmp_path)
    facts = import_transformers(tmp_path).facts
    assert facts["mean"] == [0.1, 0.2, 0.3] and facts["std"] == [0.4] * 3 and facts["pooling"] == "class"

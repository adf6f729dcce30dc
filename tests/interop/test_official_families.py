"""Official files of networks with rotary or relative positions: laid out here by the inverse naming, read, and compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitssl.cli import main
from vitssl.errors import CheckpointError
from vitssl.interop.official import import_official
from vitssl.interop.ours import tokens_of
from vitssl.interop.parity import difference, exactly
from vitssl.interop.shapes import dinov3_section_of

GOLDEN = Path(__file__).parents[1] / "golden"
State = dict[str, Tensor]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}


def made(name: str, **arguments: Any) -> torch.nn.Module:
    """A timm encoder, every weight random."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **{**TINY, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def periods(num: int = 4, base: float = 100.0) -> Tensor:
    return base ** (torch.arange(num) / num)


def as_dinov3(model: torch.nn.Module) -> State:
    """timm's state under Meta's names, with the bias of keys that a mask holds at zero, and all that lies beside."""
    names = {"reg_token": "storage_tokens", "fc1_g": "w1", "fc1_x": "w2", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    gated = any("fc1_g" in name for name in model.state_dict())
    names |= {"fc2": "w3"} if gated else {}
    found, state = {}, model.state_dict()
    for name, tensor in state.items():
        if name.endswith("v_bias"):
            continue
        if name.endswith("q_bias"):
            part = name.removesuffix("q_bias")
            keys = torch.full_like(tensor, 0.7)  # masked, so of no effect
            found[f"{part}qkv.bias"] = torch.cat([tensor, keys, state[f"{part}v_bias"]])
            found[f"{part}qkv.bias_mask"] = torch.cat([torch.ones(32), torch.zeros(32), torch.ones(32)])
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = tensor.clone()
    return found | {"mask_token": torch.ones(1, 32), "rope_embed.periods": periods()}


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def read(state: Any, folder: Path, **options: Any) -> Any:
    torch.save(state, folder / "file.pth")
    return import_official(folder / "file.pth", **options)


def same(model: torch.nn.Module, encoder: torch.nn.Module, size: tuple[int, int]) -> float:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with exactly(model, encoder):
        return difference(tokens_of(encoder, images), model.forward_features(images))


DINOV3 = {
    "with biases": ("vit_small_patch16_dinov3_qkvb", {}),
    "without": ("vit_small_patch16_dinov3", {"num_reg_tokens": 2}),
    "gated, an odd width": ("vit_small_plus_patch16_dinov3_qkvb", {"mlp_ratio": 1.3, "swiglu_align_to": 1}),
    "no registers": ("vit_small_patch16_dinov3_qkvb", {"num_reg_tokens": 0, "in_chans": 2}),
}


@pytest.mark.parametrize("lies", ["bare", "teacher"])
@pytest.mark.parametrize("case", DINOV3)
def test_dinov3(case: str, lies: str, tmp_path: Path) -> None:
    name, arguments = DINOV3[case]
    model = made(name, **arguments)
    state = as_dinov3(model)
    if case == "gated, an odd width":
        state |= {f"local_cls_norm.{last}": torch.ones(32) for last in ("weight", "bias")}
    file = (
        state if lies == "bare" else {"teacher": prefixed(state, "backbone.") | {"dino_head.last_layer.weight": torch.ones(2)}}
    )
    found = read(file, tmp_path)
    assert found.facts["format"] == "dinov3" and found.facts["pooling"] == "class" and "rotations" not in found.facts
    assert found.section.image_size == (56, 56) and found.encoder.spec.heads == 2
    assert sum(count for _, count in found.coverage) == len(state) + (lies == "teacher")
    channels = arguments.get("in_chans", 3)
    for size in ((56, 56), (24, 40)):
        images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        with exactly(model, found.encoder):
            assert difference(tokens_of(found.encoder, images), model.forward_features(images)) < 1e-12
    expected = model.state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in found.encoder.state().items()} == {
        key: tuple(tensor.shape) for key, tensor in expected.items()
    }
    assert all(torch.equal(found.encoder.state()[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", ["vit_small_plus_patch16_dinov3_qkvb", "vit_large_patch16_dinov3", "vit_7b_patch16_dinov3"])
def test_dinov3_of_a_size_that_has_a_name(name: str) -> None:
    """By shapes alone: nothing is computed."""
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    section = dinov3_section_of(state)
    assert section["name"] == name and section["arguments"] == {}
    assert section["image_size"] == [224, 224] and section["registers"] == 4


def test_dinov3_with_a_bias_of_keys(tmp_path: Path) -> None:
    """As networks trained without the mask have: timm's other attention holds it."""
    model = made("vit_small_patch16_dinov3", attn_type="rope", qkv_bias=True)
    found = read(as_dinov3(model), tmp_path)
    assert found.section.arguments["attn_type"] == "rope"
    assert same(model, found.encoder, (56, 56)) < 1e-12


def test_dinov3_with_rounded_periods_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = as_dinov3(made("vit_small_patch16_dinov3_qkvb")) | {"rope_embed.periods": periods().bfloat16()}
    torch.save(state, tmp_path / "file.pth")
    assert main(["import", str(tmp_path / "file.pth"), str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rotations of base 100 in float32, from which the file's periods differ by 1.9e-03" in said
    state["rope_embed.periods"] = periods(base=50.0)
    with pytest.raises(CheckpointError, match=r"rotary periods are not those of base 100, .* \(they differ by 40\.5%\)"):
        read(state, tmp_path)


RELATIVE: dict[str, tuple[dict[str, Any], str, Callable[[State], Any]]] = {
    "BEiT, pretraining": ({"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}, "beit", lambda s: {"model": s}),
    "BEiT, fine-tuned": ({"global_pool": "avg"}, "beit", lambda s: {"module": s | {"head.weight": torch.ones(2, 32)}}),
    "BEiT v2": ({}, "beit_v2", lambda s: {"model": s | {"cls_pt_layers.0.norm1.weight": torch.ones(32)}}),
    "data2vec": ({"use_abs_pos_emb": True}, "data2vec", lambda s: {"model": s, "model_ema": s}),
    "no layer scale, other widths": ({"init_values": None, "mlp_ratio": 2.7, "embed_dim": 24}, "beit", lambda s: {"model": s}),
}


@pytest.mark.parametrize("case", RELATIVE)
def test_relative_positions(case: str, tmp_path: Path) -> None:
    arguments, name, pack = RELATIVE[case]
    model = made("beit_base_patch16_224", img_size=16, **{"global_pool": "token", **arguments})
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state |= {"mask_token": torch.ones(1, 1, 32), "lm_head.weight": torch.ones(5, 32)}
    state |= {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    file = pack(state)
    with pytest.raises(
        CheckpointError, match=r"may be of beit or beit_v2 or data2vec, whose encoders have the same names; say"
    ):
        read(file, tmp_path)
    found = read(file, tmp_path, format=name)
    assert found.facts["pooling"] == "mean" and found.facts["mean"][0] == (0.5 if name == "beit" else 0.485)
    assert sum(count for _, count in found.coverage) == sum(len(part) for part in file.values())
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with exactly(model, found.encoder):
        last = found.encoder(images, last_blocks=1)
        if case == "BEiT, fine-tuned":
            mean = last.blocks[0].patches.mean(dim=1)
            assert difference(found.encoder.norm(mean), model.forward(images)) < 1e-12
        else:
            assert difference(tokens_of(found.encoder, images), model.forward_features(images)) < 1e-12


def test_simmim_is_the_official_one(tmp_path: Path) -> None:
    weights, inputs, outputs = (
        load_file(GOLDEN / "simmim" / f"{part}.safetensors") for part in ("weights", "inputs", "outputs")
    )
    assert json.loads((GOLDEN / "simmim/meta.json").read_text())["config"]["heads"] == 2
    found = read({"model": weights}, tmp_path)
    assert found.facts["format"] == "simmim" and sum(count for _, count in found.coverage) == len(weights)
    mask, token = inputs["mask"].flatten(1).bool(), weights["encoder.mask_token"].flatten().double()
    with exactly(found.encoder):
        patches = found.encoder(inputs["imgs"].double(), mask=mask, mask_token=token).patches
    torch.testing.assert_close(patches.transpose(1, 2).unflatten(2, (4, 4)), outputs["encoder_out"], rtol=0, atol=1e-12)
    with pytest.raises(CheckpointError, match=r"1 tensors belong to no part of simmim \(model.encoder.odd\)"):
        read({"model": weights | {"encoder.odd": torch.ones(1)}}, tmp_path, format="simmim")


@pytest.mark.parametrize(
    "name, format", [("vit_base_patch16_clip_224", "open_clip"), ("vit_base_patch16_clip_quickgelu_224", "openai_clip")]
)
def test_clip_towers(name: str, format: str, tmp_path: Path) -> None:
    """Under open_clip's names, with the text tower beside; the file does not say the activation."""
    model = made(name, img_size=16, mlp_ratio=3.0)
    state = {"visual.proj": torch.ones(32, 8), "text_projection": torch.ones(32, 8), "logit_scale": torch.ones(())}
    state |= {"token_embedding.weight": torch.ones(9, 32), "transformer.resblocks.0.ln_1.weight": torch.ones(32)}
    names = {"patch_embed.proj": "conv1", "norm_pre": "ln_pre", "norm1": "ln_1", "norm2": "ln_2", "norm.": "ln_post."}
    names |= {"blocks.": "transformer.resblocks.", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj"}
    names |= {"fc1": "c_fc", "fc2": "c_proj", "cls_token": "class_embedding", "pos_embed": "positional_embedding"}
    for key, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[f"visual.{key}"] = tensor.squeeze(0).squeeze(0) if "embedding" in key else tensor.clone()
    with pytest.raises(CheckpointError, match="may be of open_clip or openai_clip, whose encoders have the same names; say"):
        read(state, tmp_path, heads=2)
    found = read({"state_dict": prefixed(state, "module."), "epoch": 3}, tmp_path, heads=2, format=format)
    assert sum(count for _, count in found.coverage) == len(state) and found.facts["std"][0] == 0.26862954
    assert same(model, found.encoder, (16, 16)) < 1e-12
    with pytest.raises(CheckpointError, match=f"1 tensors belong to no part of {format} .visual.odd"):
        read(state | {"visual.odd": torch.ones(1)}, tmp_path, heads=2, format=format)

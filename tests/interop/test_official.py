"""Official checkpoints become encoders that compute what the official code computed, from real files with all they carry."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitssl.errors import CheckpointError
from vitssl.interop.official import import_official
from vitssl.interop.source import import_weights
from vitssl.models.encoder import Tokens

GOLDEN = Path(__file__).parents[1] / "golden"
State = dict[str, Tensor]


def golden(name: str) -> tuple[State, State, State, dict[str, Any]]:
    """Weights, inputs, outputs and configuration."""
    tensors = (load_file(GOLDEN / name / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    return *tensors, json.loads((GOLDEN / name / "meta.json").read_text())["config"]


def under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def ddp(state: State) -> State:
    """As DistributedDataParallel calls them."""
    return {f"module.{name}": tensor for name, tensor in state.items()}


EXTRA = {
    "args": argparse.Namespace(lr=np.float64(0.1), data_path=np.str_("/somewhere"), betas=np.ones(2, dtype=np.float32)),
    "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    "epoch": 300,
    "scaler": {"scale": 1.0},
}


def mae(weights: State) -> dict:
    return {"model": {name: tensor for name, tensor in weights.items() if not name.startswith("ft.")}, **EXTRA}


def dinov2_training(weights: State) -> dict:
    """As its training writes it: blocks in chunks, with heads."""
    chunked = {f"backbone.{name}".replace("blocks.", "blocks.0."): tensor for name, tensor in under(weights, "vit.").items()}
    return {"teacher": chunked | {f"dino_head.{name}": tensor for name, tensor in under(weights, "head.").items()}}


FILES: dict[str, tuple[str, Callable[[State], Any]]] = {
    "mae": ("mae", mae),
    "mae, encoder alone": ("mae", lambda w: {"model": {k: v for k, v in mae(w)["model"].items() if "decoder" not in k}}),
    "moco_v3": ("moco_v3", lambda w: {"state_dict": ddp(w), "arch": "vit_small", **EXTRA}),
    "dino": (
        "dino",
        lambda w: {"student": ddp(under(w, "student.")), "teacher": under(w, "student."), "dino_loss": {}, **EXTRA},
    ),
    "ibot": ("ibot", lambda w: {"student": ddp(under(w, "student.")), "teacher": under(w, "teacher."), **EXTRA}),
    "dinov2": ("dinov2", lambda w: under(w, "vit.")),
    "dinov2, training": ("dinov2", dinov2_training),
    "ijepa": (
        "ijepa",
        lambda w: {name: ddp(under(w, f"{name}.")) for name in ("encoder", "predictor", "target_encoder")} | EXTRA,
    ),
}
OUTPUTS: dict[str, Callable[[Callable[[str], Tokens], State], list[tuple[Tensor, Tensor, float]]]] = {
    "mae": lambda see, out: [(see("imgs").cls, out["ft.cls.features"], 1e-12)],
    "moco_v3": lambda see, out: [(see(f"x{n}").cls, out[f"one.feat{n}"], 1e-12) for n in (1, 2)],
    "dino": lambda see, out: [(see(f"img_res{n}").cls, out[f"vit.res{n}.cls"], 1e-12) for n in (0, 1)],
    "ibot": lambda see, out: [],
    "dinov2": lambda see, out: [
        (found, out[f"vit{size}.x_norm_{which}"], 1e-6)  # the class token's sum with its position is float32 here
        for size, tokens in (("", see("img")), ("_big", see("img_big")))
        for which, found in (
            ("clstoken", tokens.cls),
            ("patchtokens", tokens.patches),
            ("regtokens", tokens.prefix[:, 1:]),
        )
    ],
    "ijepa": lambda see, out: [(see("imgs").patches, out["step0.target_tokens"], 1e-12)],
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors"])
def test_forward_is_the_official_ones(case: str, suffix: str, tmp_path: Path) -> None:
    name, pack = FILES[case]
    weights, inputs, outputs, config = golden(name)
    path, packed = tmp_path / f"file{suffix}", pack(weights)
    if suffix == ".safetensors":
        flat = {f"{top}.{key}": value for top, each in packed.items() if isinstance(each, dict) for key, value in each.items()}
        flat = {key: value.clone() for key, value in flat.items() if isinstance(value, Tensor)}
        save_file(flat or {key: value.clone() for key, value in packed.items()}, path)
    else:
        torch.save(packed, path)
    found = import_official(path, heads=(config.get("model") or config).get("heads"))
    assert found.facts["format"] == name
    encoder = found.encoder.double().eval()

    def see(images: str) -> Tokens:
        given = inputs[images].double()
        with torch.no_grad():
            return encoder(given[0] if given.ndim == 5 else given)

    for got, expected, tolerance in OUTPUTS[name](see, outputs):
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    kept = sum(count for _, count in found.coverage)
    assert kept == len([1 for _ in _tensors(packed)]) or suffix == ".safetensors"


FLAWS = {
    "a tensor more": (lambda p: p["model"].update(odd=torch.ones(2)), None, r"of none of the known formats .*; name one with"),
    "a tensor more, named": (lambda p: p["model"].update(odd=torch.ones(2)), "mae", r"1 tensors belong to no part of mae"),
    "a tensor less": (
        lambda p: p["model"].pop("blocks.1.attn.qkv.weight"),
        "mae",
        r"1 missing \(blocks\.1\.attn\.qkv\.weight\)",
    ),
    "no encoder": (lambda p: p["model"].pop("patch_embed.proj.weight"), "mae", r"is no checkpoint of mae"),
    "another format": (lambda p: None, "ijepa", r"is no checkpoint of ijepa: \d+ tensors such as"),
    "no MLP": (
        lambda p: p["model"].pop("blocks.0.mlp.fc1.weight"),
        "mae",
        r"no whole .* mae: blocks\.0\.mlp\.fc1\.weight is miss",
    ),
    "no positions": (lambda p: p["model"].pop("pos_embed"), "mae", r"no whole checkpoint of mae: pos_embed is missing"),
    "no blocks": (
        lambda p: [p["model"].pop(name) for name in list(p["model"]) if name.startswith("blocks.")],
        "mae",
        r"no whole checkpoint of mae: tensors are missing",
    ),
    "whole numbers": (
        lambda p: p["model"].update({"norm.bias": torch.ones(24, dtype=torch.int8)}),
        "mae",
        r"norm\.bias holds whole",
    ),
    "an unknown format": (lambda p: None, "mea", r"--format mea: is none of mae, moco_v3"),
    "no square": (lambda p: p["model"].update(pos_embed=torch.zeros(1, 16, 24)), "mae", r"15 positions are no square grid"),
    "no tensors": (lambda p: [p.pop(name) for name in ("model", "optimizer")], None, r"holds no tensors"),
    "one twice": (
        lambda p: p.update(module={"epoch": torch.ones(1)}, epoch=torch.zeros(1)),
        None,
        r"holds two tensors epoch, one below",
    ),
    "a stranger's numbers": (lambda p: p.update(lr=np.ones(1, dtype=complex)), None, r"numpy\.dtypes\.Complex128DType,"),
    "a stranger": (lambda p: p.update(path=Path("/x")), None, r"holds objects of the kind pathlib\.\w+, which would run code"),
}


@pytest.mark.parametrize("case", FLAWS)
def test_flaws_are_named(case: str, tmp_path: Path) -> None:
    spoil, format, words = FLAWS[case]
    packed = mae(golden("mae")[0])
    spoil(packed)
    torch.save(packed, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=words) as raised:
        import_official(tmp_path / "file.pth", format=format, heads=3)
    assert "\n" not in str(raised.value)


def test_numbers_that_are_none_and_other_channels(tmp_path: Path) -> None:
    packed = mae(golden("mae")[0])
    packed["model"]["patch_embed.proj.weight"] = packed["model"]["patch_embed.proj.weight"].repeat(1, 2, 1, 1)
    torch.save(packed, tmp_path / "six.pth")
    found = import_weights(str(tmp_path / "six.pth"), heads=3)
    assert found.section.channels == 6 and len(found.facts["mean"]) == len(found.facts["std"]) == 6
    with pytest.raises(CheckpointError, match="--heads -2: is no number of attention heads"):
        import_weights(str(tmp_path / "six.pth"), heads=-2)
    packed["model"]["norm.bias"][0] = torch.nan
    torch.save(packed, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"norm\.bias holds numbers that are not finite"):
        import_weights(str(tmp_path / "nan.pth"), heads=3)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist"):
        import_official(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=rf"{tmp_path} is a folder; .* hf:{tmp_path} for a model of transformers"):
        import_official(tmp_path)
    whole = tmp_path / "whole.pth"
    torch.save(mae(golden("mae")[0]), whole)
    for content in (b"", b"x" * 1000, whole.read_bytes()[:5000]):
        for suffix in (".pth", ".safetensors"):
            (tmp_path / f"bad{suffix}").write_bytes(content)
            with pytest.raises(CheckpointError, match=r"is damaged") as raised:
                import_official(tmp_path / f"bad{suffix}")
            assert "\n" not in str(raised.value)


def test_tensors_of_other_shapes(tmp_path: Path) -> None:
    """Parts that are joined while the state is made, before anything is compared with a network."""
    state = FILES["dinov2"][1](golden("dinov2")[0])
    for damaged in (torch.zeros(1, 1, 3), torch.zeros(0)):
        torch.save({**state, "cls_token": damaged}, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match=r"is no whole checkpoint of dinov2: tensors are missing or of other shapes"):
            import_official(tmp_path / "file.pth", heads=2)


def test_equal_names_ask_which_is_meant(tmp_path: Path) -> None:
    """A bare state may be DINO's or timm's own: positions are carried to other sizes by different rules."""
    weights = under(golden("dino")[0], "teacher.backbone.")
    torch.save(weights, tmp_path / "file.pth")
    with pytest.raises(
        CheckpointError, match=r"may be of dino or timm, whose encoders have the same names; say which with --format"
    ):
        import_official(tmp_path / "file.pth", heads=2)
    assert import_official(tmp_path / "file.pth", format="dino", heads=2).section.pos_resample == "dino"
    assert import_official(tmp_path / "file.pth", format="timm", heads=2).section.pos_resample == "timm"
    with pytest.raises(CheckpointError, match=r"a width of 16 does not say how many heads there are; say it with --heads"):
        import_official(tmp_path / "file.pth", format="dino")


def _tensors(values: Any) -> Any:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)

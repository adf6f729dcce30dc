"""SimMIM against the official implementation: tokens, painted pixels, loss and every gradient."""

import re

import pytest
import torch
from official_numbers import Golden, beit, close

from vitssl.errors import ConfigError
from vitssl.losses.pixels import patchify, unpatchify
from vitssl.losses.regression import masked_l1
from vitssl.models.encoder import Encoder
from vitssl.objectives import create
from vitssl.objectives.base import Nets
from vitssl.objectives.simmim import SimMIM

OFFICIAL = Golden("simmim")
CONFIG = OFFICIAL.config
EPS = 3e-5  # 1e-5 for each of three channels; left out by us, since parts of a batch would not add up to the whole


def official(dtype: torch.dtype) -> tuple[Encoder, SimMIM]:
    """The tiny official model with its weights."""
    encoder = beit(CONFIG, bias=CONFIG["rpb"])
    objective = create("simmim", {"mask_unit": CONFIG["mask_patch"], "mask_ratio": CONFIG["ratio"]}, encoder.spec)
    own = parameters(encoder, objective)
    for name, value in OFFICIAL.weights.items():
        if not name.endswith("relative_position_index"):
            parameter = own.pop(name)
            parameter.data.copy_(value.reshape(parameter.shape))
    assert not own
    return encoder.to(dtype), objective.to(dtype)


def parameters(encoder: Encoder, objective: SimMIM) -> dict[str, torch.nn.Parameter]:
    """By their official names."""
    head = {"mask_token": "encoder.mask_token", "paint.weight": "decoder.0.weight", "paint.bias": "decoder.0.bias"}
    found = {f"encoder.{name.removeprefix('vit.')}": p for name, p in encoder.named_parameters()}
    return found | {head[name]: p for name, p in objective.named_parameters()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_it_equals_the_official_model(dtype: torch.dtype, tolerance: float):
    encoder, objective = official(dtype)
    images, mask = OFFICIAL.inputs["imgs"].to(dtype), OFFICIAL.inputs["mask"].flatten(1).bool()
    seen = {}
    encoder.register_forward_hook(lambda _, args, tokens: seen.update(tokens=tokens.patches))
    pred = objective.predict(Nets(encoder), images, mask)
    close(seen["tokens"].mT.reshape(OFFICIAL.outputs["encoder_out"].shape), OFFICIAL.outputs["encoder_out"], tolerance)
    whole = unpatchify(pred, encoder.spec.patch, encoder.spec.grid, channels_first=True)
    close(whole, OFFICIAL.outputs["reconstruction"], tolerance)

    loss = masked_l1(pred, patchify(images, encoder.spec.patch, channels_first=True), mask, eps=EPS)
    close(loss, OFFICIAL.outputs["loss"], tolerance)
    loss.backward()
    own = parameters(encoder, objective)
    for name, expected in OFFICIAL.below("grad/").items():
        close(own[name].grad.reshape(expected.shape), expected, tolerance)


def test_its_own_loss_is_the_official_one_but_for_the_epsilon(monkeypatch: pytest.MonkeyPatch):
    encoder, objective = official(torch.float64)
    mask = OFFICIAL.inputs["mask"].flatten(1).bool()
    monkeypatch.setattr(objective, "_masks", lambda draw: mask)
    loss, metrics = objective(Nets(encoder), {"image": OFFICIAL.inputs["imgs"].double()}, None, None)
    numbers = int(mask.sum()) * objective.paint.out_features
    close(loss * numbers / (numbers + EPS), OFFICIAL.outputs["loss"], 1e-12)
    assert torch.equal(metrics["loss"], loss)


@pytest.mark.parametrize("row", OFFICIAL.tables["generator"], ids=lambda row: str(row["input_size"]))
def test_it_masks_as_many_as_the_official_generator(row: dict):
    settings = {"image_size": row["input_size"], "patch_size": row["model_patch_size"]}
    spec = Encoder.create("test_vit", **settings).spec
    objective = create("simmim", {"mask_unit": row["mask_patch_size"], "mask_ratio": row["ratio"]}, spec)
    masks = objective._masks(lambda name, num: torch.rand(5, num, dtype=torch.float64))
    assert objective.num_masked == row["mask_count_units"]
    assert set(masks.sum(dim=1).tolist()) == {row["masked_tokens_min"]} == {row["masked_tokens_max"]}


def test_the_pictures_show_what_is_hidden():
    encoder, objective = official(torch.float64)
    images, noise = OFFICIAL.inputs["imgs"].double(), torch.rand(3, 4, dtype=torch.float64)
    pictures = objective.reconstruct(Nets(encoder), images, lambda name, num: noise)
    hidden = objective._masks(lambda name, num: noise).view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    hidden = hidden.expand_as(images)
    assert torch.equal(pictures.original, images) and 0 < hidden.sum() < hidden.numel()
    assert not pictures.masked[hidden].any() and torch.equal(pictures.masked[~hidden], images[~hidden])
    assert torch.equal(pictures.pasted[hidden], pictures.prediction[hidden])
    assert torch.equal(pictures.pasted[~hidden], images[~hidden])


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"mask_unit": 12},
            "objectives.simmim.mask_unit=12 pixels: patches of 8x8 must divide it, and it an image of 32x32; "
            "possible are 8, 16",
        ),
        ({"mask_unit": 16, "mask_ratio": 0.8}, "mask_ratio=0.8 masks all of 4 units; take at most 0.75 or a smaller mask_unit"),
    ],
)
def test_masks_that_cannot_be_are_refused(settings: dict, message: str):
    spec = Encoder.create("test_vit", image_size=32, patch_size=8).spec
    with pytest.raises(ConfigError, match=re.escape(message)):
        create("simmim", settings, spec)


def test_an_image_of_few_patches_has_no_units():
    spec = Encoder.create("test_vit", image_size=(16, 24), patch_size=(8, 12)).spec
    with pytest.raises(ConfigError, match="an image of 16x24; none does"):
        create("simmim", {}, spec)

"""Sheets: where each pixel stands, and colours that are the image's own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitssl.inspect.pictures import GAP, SHOWN, save_sheet, sheet
from vitssl.losses.pixels import normalize_patches, patchify
from vitssl.models.encoder import Encoder
from vitssl.objectives import create
from vitssl.objectives.mixture import Mixture
from vitssl.schedule import Clock
from vitssl.task import Batch

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def slow_sheet(pictures: Tensor) -> np.ndarray:
    """Pixel by pixel onto white paper."""
    rows, columns, channels, height, width = pictures.shape
    factor = -(-SHOWN // height)
    tall, wide = height * factor + GAP, width * factor + GAP
    paper = np.full((rows * tall - GAP, columns * wide - GAP, 3), 255, dtype=np.uint8)
    for row, column, y, x, channel in np.ndindex(rows, columns, height * factor, width * factor, 3):
        value = pictures[row, column, channel if channels >= 3 else 0, y // factor, x // factor]
        paper[row * tall + y, column * wide + x, channel] = round(float(value) * 255)
    return paper


@pytest.mark.parametrize("shape", [(2, 3, 3, 30, 20), (1, 1, 1, 64, 8), (2, 1, 4, 70, 5), (1, 2, 2, 33, 7)])
def test_where_each_pixel_stands(shape: tuple[int, ...]):
    pictures = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    pixels = sheet(pictures)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.numpy(), slow_sheet(pictures))


def test_one_channel_is_grey():
    pixels = sheet(torch.rand(1, 2, 1, 64, 64))
    assert torch.equal(pixels[..., 0], pixels[..., 1]) and torch.equal(pixels[..., 0], pixels[..., 2])


def test_a_sheet_is_written_as_it_is(tmp_path: Path):
    pixels = sheet(torch.rand(2, 2, 3, 16, 16))
    save_sheet(tmp_path / "pictures" / "a.png", pixels)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / "a.png")), pixels.numpy())


def mixture(norm_pix: bool) -> Mixture:
    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = Encoder.create("vit_tiny_patch16_224", image_size=16, patch_size=4, arguments=arguments)
    mae = create("mae", {"norm_pix": norm_pix, "decoder": {"dim": 8, "depth": 1, "heads": 1}}, encoder.spec)
    return Mixture(encoder, {"mae": mae}, mean=MEAN, std=STD)


def predict_exactly(task: Mixture, images: Tensor, norm_pix: bool) -> Callable:
    """A decoder that knows the answer: the target of the loss, for every patch."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = patchify((images.float() / 255 - mean) / std, (4, 4))
    target = normalize_patches(pixels)[0] if norm_pix else pixels
    return lambda tokens, keep, places: target


@pytest.mark.parametrize("norm_pix", [True, False])
def test_colours_are_honest(norm_pix: bool, monkeypatch: pytest.MonkeyPatch):
    """An exact prediction gives the image back; what the encoder does not see is the mean colour; pasting changes nothing."""
    task = mixture(norm_pix).eval()
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(task.objectives["mae"].decoder, "forward", predict_exactly(task, images, norm_pix))
    batch = Batch({next(iter(task.views)): images}, torch.arange(3))
    pictures = task.pictures(batch, Clock(step=0, total=1, samples=0, seed=0))
    assert pictures.shape == (3, 4, 3, 16, 16)
    truth = images.float() / 255
    original, masked, prediction, pasted = pictures.unbind(dim=1)
    for column in (original, prediction, pasted):
        torch.testing.assert_close(column, truth, rtol=0, atol=2e-3)
    seen = (masked - truth).abs().amax(dim=1) < 1e-5  # [3, 16, 16]
    grey = (masked - torch.tensor(MEAN)[:, None, None]).abs().amax(dim=1) < 1e-5
    assert torch.all(seen ^ grey) and seen.float().mean() == 0.25
    assert np.abs(sheet(pictures).numpy()[:64, :64].astype(int) - slow_sheet(truth[:1, None])).max() <= 1


def test_a_wrong_prediction_shows_only_where_patches_were_removed(monkeypatch: pytest.MonkeyPatch):
    task = mixture(norm_pix=False).eval()
    images = torch.full((2, 3, 16, 16), 30, dtype=torch.uint8)
    monkeypatch.setattr(task.objectives["mae"].decoder, "forward", lambda tokens, keep, places: torch.zeros(2, 16, 48))
    batch = Batch({next(iter(task.views)): images}, torch.arange(2))
    _, masked, prediction, pasted = task.pictures(batch, Clock(step=0, total=1, samples=0, seed=0)).unbind(dim=1)
    mean = torch.tensor(MEAN)[:, None, None].expand_as(prediction)
    torch.testing.assert_close(prediction, mean)
    torch.testing.assert_close(pasted, masked)
    assert (pasted - 30 / 255).abs().amax(dim=1).lt(1e-5).float().mean() == 0.25

"""Sheets of pictures: the same images through training, a row an image.

Reconstructions have four columns: the image, what the encoder sees of it, the prediction for every patch, and the prediction
with the visible patches pasted in. With per-patch normalised targets a prediction is painted with the target's own mean and
deviation, which the model never predicts: structure is its own, colour and contrast are given.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

GAP = 2  # white pixels between pictures
SHOWN = 64  # pixels, at least, on the height of a picture


def sheet(pictures: Tensor) -> Tensor:
    """[rows, columns, C, H, W] in [0, 1] -> [height, width, 3] uint8. The first three channels are shown, or one as grey."""
    pictures = pictures[:, :, :3] if pictures.shape[2] >= 3 else pictures[:, :, :1].expand(-1, -1, 3, -1, -1)
    pixels = (pictures.float() * 255).round().to(torch.uint8)
    factor = -(-SHOWN // pixels.shape[-2])
    pixels = pixels.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    pixels = torch.nn.functional.pad(pixels, (0, GAP, 0, GAP), value=255)
    rows, columns, _, height, width = pixels.shape
    return pixels.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)[:-GAP, :-GAP].cpu()


def save_sheet(path: Path, pixels: Tensor) -> None:
    """Write a sheet [height, width, 3] uint8 as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)

"""Pictures of a classifier's results: the confusion matrix, and the images it got wrong with what it took them for."""

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

NAMED = 40  # classes up to which rows and columns carry names
CELL, LARGEST = 22, 1000  # pixels of a cell, and of a side where classes are many
LINE = 12  # pixels of a line of text
TILE = 112  # pixels, at least, of a picture's width on a sheet, so that its caption has room
INK = (20, 60, 130)
AXES = ("truth", "predicted")  # beside the rows, above the columns


def confusion_chart(counts: Tensor, classes: Sequence[str]) -> Tensor:
    """[classes, classes] counts -> [height, width, 3] uint8: a row a true class, darker where more of it went.

    Each row is shaded by its share (a class of few images is as dark as one of many); few classes are named, with counts.
    ``AXES`` at the left and the top say which is which.
    """
    num = len(counts)
    shares = (counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    cell = CELL if num <= NAMED else max(1, LARGEST // num)
    shade = np.sqrt(np.kron(shares, np.ones((cell, cell))))[..., None]  # the root shows rare mistakes
    pixels = (255 + shade * (np.array(INK) - 255)).round().astype(np.uint8)
    names = [_short(name, 18) for name in drawable(classes)] if num <= NAMED else []
    margin = LINE + max((_width(name) for name in names), default=0) + 8
    canvas = Image.new("RGB", (margin + num * cell, margin + num * cell), "white")
    canvas.paste(Image.fromarray(pixels), (margin, margin))
    _axes(canvas, margin)
    if num > NAMED:
        return torch.from_numpy(np.array(canvas))
    draw = ImageDraw.Draw(canvas)
    for row in range(num):
        draw.text((margin - 4, margin + row * cell + cell // 2), names[row], fill="black", anchor="rm")
        for column in range(num):
            if count := int(counts[row, column]):
                place = margin + column * cell + cell // 2, margin + row * cell + cell // 2
                draw.text(place, _brief(count), fill="white" if shares[row, column] > 0.3 else "black", anchor="mm")
    _names_above(canvas, names, margin, cell)
    return torch.from_numpy(np.array(canvas))


def drawable(classes: Sequence[str]) -> list[str]:
    """Names in the letters that Pillow's own font has: accents go; what is left is a ?, and the class's number goes before."""
    found = []
    for number, name in enumerate(classes):
        plain = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
        known = "".join(letter if " " <= letter <= "~" else "?" for letter in plain)
        found.append(name if known == name else plain if known == plain else f"#{number} {known}")
    return found


def mistakes_sheet(images: Sequence[Tensor], captions: Sequence[str], *, columns: int = 8) -> Tensor:
    """Each [C, H, W] in [0, 1] and a caption of up to two lines -> a sheet [height, width, 3] uint8, ``columns`` wide.

    The first three channels are shown, or one as grey. Raises ValueError for no image.
    """
    if not images:
        raise ValueError("a sheet needs at least one image")
    columns = min(columns, len(images))
    tiles = [_tile(image) for image in images]
    wide, high = max(tile.width for tile in tiles) + 4, max(tile.height for tile in tiles) + 2 * LINE + 6
    canvas = Image.new("RGB", (columns * wide, -(-len(tiles) // columns) * high), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = number % columns * wide, number // columns * high
        canvas.paste(tile, (left, top))
        for line, text in enumerate(caption.split("\n")[:2]):
            draw.text((left + 1, top + tile.height + line * LINE), _fitting(text, wide - 4), fill="black")
    return torch.from_numpy(np.array(canvas))


def _tile(image: Tensor) -> Image.Image:
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    tile = Image.fromarray(pixels)
    factor = -(-TILE // tile.width)
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)


def _names_above(canvas: Image.Image, names: Sequence[str], margin: int, cell: int) -> None:
    """Columns' names, written upwards."""
    for column, name in enumerate(names):
        canvas.paste(_upwards(name, margin - LINE - 4), (margin + column * cell + (cell - LINE) // 2, LINE))


def _axes(canvas: Image.Image, margin: int) -> None:
    """The words of both axes, in the middle of theirs, or as far back as they need to be whole."""
    for word, upwards in zip(AXES, (True, False), strict=True):
        long = _width(word) + 1
        begin = min((margin + canvas.width - long) // 2, canvas.width - long)
        if upwards:
            canvas.paste(_upwards(word, long, fill="grey"), (0, begin))
        else:
            ImageDraw.Draw(canvas).text((begin, LINE // 2), word, fill="grey", anchor="lm")


def _upwards(text: str, length: int, *, fill: str = "black") -> Image.Image:
    """A line of text turned to be read from below; ``length`` pixels high."""
    strip = Image.new("RGB", (length, LINE), "white")
    ImageDraw.Draw(strip).text((0, LINE // 2), text, fill=fill, anchor="lm")
    return strip.transpose(Image.Transpose.ROTATE_90)


def _width(text: str) -> int:
    return int(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(text))


def _fitting(text: str, width: int) -> str:
    while _width(text) > width and len(text) > 1:
        text = text[:-1]
    return text


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 2] + ".."


def _brief(count: int) -> str:
    return str(count) if count < 1000 else f"{count // 1000}k"

"""The demo set: small drawn scenes in which only the outline of three or four equal objects tells the class.

Nothing to download. Colours, textures, pose, light, clutter and noise come from a random stream that never sees the label, and
all outlines cover the same area: neither colours nor raw pixels tell the class. Classes survive rotation and mirroring.
Surprising: no torch is imported here; webdataset, which imports it, is loaded only where a shard is written, in a worker.
"""

import io
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from vitssl.data.tarwrite import write_shard
from vitssl.errors import DataError

CLASSES = ("arrow", "bolt", "crescent", "cross", "flower", "gear", "heart", "hourglass", "key", "ring", "spiral", "star")
VERSION = 3  # of the pictures: raise it with every change that alters a pixel
SHARD_SAMPLES = 2_000
PIECE_SAMPLES = 250  # drawn by one process at a time
TEST_START = len(CLASSES) << 40  # the index of the first test image: no training set reaches it

_SHAPE, _SCENE, _LABELS = range(3)  # the random streams of one image
_SUPERSAMPLE = 4
_LUMA = np.array([0.299, 0.587, 0.114])
_PALETTE = np.array([
    (0.96, 0.93, 0.85), (0.13, 0.14, 0.20), (0.85, 0.27, 0.22), (0.95, 0.73, 0.25),
    (0.20, 0.55, 0.50), (0.22, 0.35, 0.65), (0.60, 0.80, 0.90), (0.50, 0.28, 0.50),
])  # fmt: skip


def draw(index: int, *, size: int = 32, seed: int = 0) -> tuple[np.ndarray, int, dict]:
    """One image, a pure function of (seed, index, size): uint8 [size, size, 3], its label, the factors of its scene.

    Any ``len(CLASSES)`` images that start at a multiple of that number hold every class once.
    """
    block, place = divmod(index, len(CLASSES))
    label = int(np.random.default_rng([seed, block, _LABELS]).permutation(len(CLASSES))[place])
    outline = _outline(CLASSES[label], np.random.default_rng([seed, index, _SHAPE]))
    image, factors = _scene(outline, np.random.default_rng([seed, index, _SCENE]), size)
    return image, label, factors


def render(
    folder: Path,
    *,
    num_train: int = 12_000,
    num_test: int = 2_000,
    size: int = 32,
    seed: int = 0,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``train-*.tar``, ``test-*.tar`` and ``about.json`` into ``folder``; return at once where this set already is.

    The folder appears whole, by one rename, with the same bytes every time (for the same numpy and Pillow). ``processes``
    draw, by default one per CPU; with 0 this process draws and writes, and so imports torch. ``progress`` is called with
    (samples done, samples in all). Raises DataError where ``folder`` holds something else.
    """
    about = {"version": VERSION, "classes": list(CLASSES), "seed": seed}
    about |= {"num_train": num_train, "num_test": num_test, "size": size}
    if _complete(folder, about):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        unfinished = Path(temporary)
        if processes == 0:
            _write(map, unfinished, about, progress)
        else:
            # Spawned, not forked: the caller may hold threads, locks or a GPU.
            pool = ProcessPoolExecutor(processes or os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
            try:
                _write(pool.map, unfinished, about, progress)
            finally:
                pool.shutdown(cancel_futures=True)
        (unfinished / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        unfinished.chmod(0o755)  # a temporary folder's 0700 would hide the set from everyone else
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster: fine, if it drew the same set
            if not _complete(folder, about):
                raise


def _complete(folder: Path, about: dict) -> bool:
    """Whether ``folder`` already holds this very set; an error where it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = dict(json.loads((folder / "about.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise DataError(f"{folder} holds no demo set that can be read (about.json): delete it or choose another") from None
    differs = [f"{key}={found.get(key)} and not {value}" for key, value in about.items() if found.get(key) != value]
    if differs:
        raise DataError(f"{folder} holds another demo set ({', '.join(differs)}): delete it or choose another folder")
    return True


def _write(mapped: Callable, folder: Path, about: dict, progress: Callable[[int, int], None] | None) -> None:
    """Draw all samples in pieces, then write the shards; ``mapped`` is ``map``, here or over processes."""
    pieces = [
        (f"{split}-{number:06d}.tar", first + start, min(PIECE_SAMPLES, stop - start))
        for split, first, num in (("train", 0, about["num_train"]), ("test", TEST_START, about["num_test"]))
        for number in range(-(-num // SHARD_SAMPLES))
        for stop in (min((number + 1) * SHARD_SAMPLES, num),)
        for start in range(number * SHARD_SAMPLES, stop, PIECE_SAMPLES)
    ]
    shards: dict[str, list[dict]] = {}
    done, total = 0, about["num_train"] + about["num_test"]
    for (shard, _, num), samples in zip(pieces, mapped(partial(_draw_piece, about["size"], about["seed"]), pieces)):
        shards.setdefault(shard, []).extend(samples)
        done += num
        if progress is not None:
            progress(done, total)
    list(mapped(write_shard, [folder / shard for shard in shards], shards.values()))


def _draw_piece(size: int, seed: int, piece: tuple[str, int, int]) -> list[dict]:
    """``(shard, first index, number)`` -> webdataset samples, keyed ``<split>-<place in the split>``."""
    shard, first, num = piece
    samples = []
    for index in range(first, first + num):
        pixels, label, _ = draw(index, size=size, seed=seed)
        stream = io.BytesIO()
        # Full-resolution chroma: at 32 pixels the usual 4:2:0 would blur colours over half an object.
        Image.fromarray(pixels).save(stream, "JPEG", quality=92, subsampling=0)
        key = f"{shard.partition('-')[0]}-{index % TEST_START:08d}"
        samples.append({"__key__": key, "jpg": stream.getvalue(), "cls": str(label).encode()})
    return samples


def _scene(outline: list[np.ndarray], rng: Generator, size: int) -> tuple[np.ndarray, dict]:
    """Place, colour, light and disturb copies of one outline. All chance is in ``rng``, which knows nothing of the class."""
    back, front = _colours(rng)
    image, background = _surface(rng, back, size)
    num_under, num_over = int(rng.integers(0, 2)), int(rng.random() < 0.2)
    for _ in range(num_under):
        _blend(image, _clutter(rng, size, scrap=0.5), _ink(rng))
    side, squeeze, shear = rng.uniform(0.22, 0.30), rng.uniform(0.8, 1.0), rng.uniform(-0.2, 0.2)
    scale = side / math.sqrt(squeeze * (_area(outline[0]) - sum(_area(hole) for hole in outline[1:])))
    slant, mask = np.array([[1.0, shear], [0.0, squeeze]]), np.zeros((size, size))
    quarters, angles = rng.permutation(4)[: int(rng.integers(3, 5))], rng.uniform(0.0, math.tau, 4)
    for quarter, angle in zip(quarters, angles):  # copies are what keeps raw pixels from matching
        centre = 0.25 + 0.5 * np.array([quarter % 2, quarter // 2]) + rng.uniform(-0.08, 0.08, 2)
        warp = _polar(np.array([angle, angle + 0.5 * math.pi]), 1.0).T @ slant
        mask = np.maximum(mask, _mask([scale * loop @ warp.T + centre for loop in outline], size))
    shadow, shift = max(0.0, rng.uniform(-0.5, 0.5)), np.rint(rng.uniform(-0.07, 0.07, 2) * size).astype(int)
    blurred = Image.fromarray((mask * 255.0).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.04 * size))
    _blend(image, np.roll(np.asarray(blurred) * (shadow / 255.0), shift, (0, 1)), np.zeros(3))
    surface, texture = _surface(rng, front, size)
    _blend(image, mask, surface)
    for _ in range(num_over):
        _blend(image, _clutter(rng, size, scrap=0.0), _ink(rng))
    light, noise = rng.uniform(-0.1, 0.1, 2), rng.uniform(0.0, 0.004)
    image *= (1.0 + light[0] * _axis(size)[:, None] + light[1] * _axis(size))[..., None]
    image += noise * rng.standard_normal(image.shape)
    factors = {
        "back": back, "front": front, "background": background, "texture": texture, "quarters": quarters,
        "side": side, "angles": angles, "squeeze": squeeze, "shear": shear, "shadow": shadow, "light": light, "noise": noise,
        "under": num_under, "over": num_over,
    }  # fmt: skip
    image = np.rint(image.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    return image, {name: np.asarray(value).tolist() for name, value in factors.items()}


def _mask(loops: list[np.ndarray], size: int, *, width: float = 0.0) -> np.ndarray:
    """float64 [size, size] in [0, 1]: the first loop filled, the others cut out of it; or a line. All in image sides."""
    canvas = Image.new("L", (size * _SUPERSAMPLE, size * _SUPERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    for number, loop in enumerate(loops):
        points = (loop * size * _SUPERSAMPLE).ravel().tolist()
        if width:
            pen.line(points, fill=255, width=max(1, round(width * size * _SUPERSAMPLE)), joint="curve")
        else:
            pen.polygon(points, fill=0 if number else 255)
    return np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.float64) / 255.0


def _clutter(rng: Generator, size: int, *, scrap: float) -> np.ndarray:
    """The mask of a small polygon, with probability ``scrap``, or of an arc thin enough to occlude without erasing."""
    if rng.random() < scrap:
        corners = np.sort(rng.uniform(0.0, math.tau, int(rng.integers(3, 7))))
        return _mask([_polar(corners, rng.uniform(0.05, 0.16)) + rng.uniform(0.0, 1.0, 2)], size)
    radius, start, sweep = rng.uniform(0.15, 1.2), rng.uniform(0.0, math.tau), rng.uniform(0.3, 0.9)
    arc = _polar(np.linspace(start, start + sweep / radius, 12), radius)
    return _mask([arc - arc.mean(axis=0) + rng.uniform(0.1, 0.9, 2)], size, width=rng.uniform(0.03, 0.06))


def _colours(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB colours that can be told apart; which of them is the brighter is chance."""
    while abs(((back := _ink(rng)) - (front := _ink(rng))) @ _LUMA) <= 0.2:
        pass
    return back, front


def _ink(rng: Generator) -> np.ndarray:
    """One RGB colour near one of the palette, for object, background and clutter alike."""
    return _PALETTE[int(rng.integers(len(_PALETTE)))] + rng.uniform(-0.05, 0.05, 3)


def _surface(rng: Generator, colour: np.ndarray, size: int) -> tuple[np.ndarray, str]:
    """float64 [size, size, 3] of ``colour`` that runs into a neighbouring one along a texture, and the texture's name."""
    texture = ("gradient", "stripes", "clouds")[int(rng.integers(3))]
    if texture == "clouds":
        cells = rng.uniform(-1.0, 1.0, [int(rng.integers(2, 6))] * 2).astype(np.float32)
        field = np.asarray(Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    else:
        angle = rng.uniform(0.0, math.tau)
        field = _axis(size) * math.cos(angle) + _axis(size)[:, None] * math.sin(angle)
        if texture == "stripes":
            field = np.tanh(3.0 * np.sin(rng.uniform(2.0, 5.0) * math.pi * field + rng.uniform(0.0, math.tau)))
    return colour + field[..., None] * rng.uniform(-0.05, 0.05, 3), texture


def _blend(image: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> None:
    image += mask[..., None] * (colour - image)


def _axis(size: int) -> np.ndarray:
    """[size] pixel centres from -1 to 1."""
    return (np.arange(size) + 0.5) * (2.0 / size) - 1.0


def _area(loop: np.ndarray) -> float:
    x, y = loop.T  # the shoelace formula
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def _polar(angles: np.ndarray, radii: np.ndarray | float) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(radii, (-1, 1))


def _turn(num: int) -> np.ndarray:
    return np.arange(num) * (math.tau / num)


def _outline(name: str, rng: Generator) -> list[np.ndarray]:
    """A class as closed loops [points, 2] around the origin, at any scale: the first is filled, the others are holes."""
    a, b, c = rng.random(3)
    match name:
        case "arrow":
            half = [(-1.0, 0.17 + 0.09 * a), (0.25 * b, 0.17 + 0.09 * a), (0.25 * b, 0.62 + 0.18 * c)]
            return [np.array([*half, (1.0, 0.0), *((x, -y) for x, y in half[::-1])])]
        case "bolt":
            half = np.array([(0.25 + 0.2 * a, -0.95), (-0.72, 0.12 + 0.12 * b), (-0.12, 0.12 + 0.12 * b)])
            return [np.concatenate([half, -half])]
        case "crescent":
            tip, hollow = 0.5 + 0.3 * a, 0.2 + 0.25 * b
            x, y = _polar(np.linspace(-0.5, 0.5, 24) * math.pi, 1.0).T
            inner = np.stack([math.cos(tip) - (math.cos(tip) + hollow) * x, math.sin(tip) * y], axis=1)
            return [np.concatenate([_polar(np.linspace(tip, math.tau - tip, 40), 1.0), inner])]
        case "cross":
            half = 0.22 + 0.12 * a
            angles = _turn(4)[:, None] + np.array([-half, half, 0.25 * math.pi])
            return [_polar(angles.ravel(), np.tile([1.0, 1.0, math.sqrt(2.0) * math.sin(half)], 4))]
        case "flower":
            return [_polar(_turn(80), 0.72 - 0.06 * a + (0.26 + 0.06 * a) * np.cos(5 * _turn(80)))]
        case "gear":
            num, valley = 7 + int(3 * a), 0.68 + 0.08 * b
            angles = _turn(num)[:, None] + np.array([-0.2, 0.2, 0.3, 0.7]) * (math.tau / num)
            return [_polar(angles.ravel(), np.tile([1.0, 1.0, valley, valley], num)), _polar(_turn(40), 0.25 + 0.1 * c)]
        case "heart":
            t = _turn(60)
            y = 13.0 * np.cos(t) - (4.0 + 2.0 * a) * np.cos(2 * t) - 2.0 * np.cos(3 * t) - np.cos(4 * t)
            return [np.stack([16.0 * np.sin(t) ** 3, y + 2.5], axis=1)]
        case "hourglass":
            x, y = 0.62 + 0.16 * a, 0.08 + 0.1 * b
            return [np.array([(-x, -0.95), (x, -0.95), (y, 0.0), (x, 0.95), (-x, 0.95), (-y, 0.0)])]
        case "key":
            bow, shaft, tooth = 0.42 + 0.08 * a, 0.14 + 0.04 * b, 0.42 + 0.1 * c
            joint = math.asin(shaft / bow)
            head, hole = _polar(np.linspace(joint, math.tau - joint, 30), bow), _polar(_turn(20), 0.42 * bow)
            xs = (1.55, 1.55, 1.33, 1.33, 1.15, 1.15, 0.93, 0.93)
            bits = np.stack([xs, (-shaft, tooth, tooth, shaft, shaft, tooth, tooth, shaft)], axis=1)
            return [loop - np.array([0.55, 0.0]) for loop in (np.concatenate([head, bits]), hole)]
        case "ring":
            return [_polar(_turn(40), 1.0), _polar(_turn(40), 0.45 + 0.2 * a)]
        case "spiral":
            t, turns, width = np.linspace(0.0, 1.0, 60), math.tau * (1.6 + 0.3 * a), 0.13 + 0.03 * b
            middle = 0.1 + (0.9 - width) * t
            return [np.concatenate([_polar(turns * t, middle + width), _polar(turns * t, middle - width)[::-1]])]
        case "star":
            return [_polar(_turn(10), np.tile([1.0, 0.38 + 0.1 * a], 5))]
    raise AssertionError(f"no outline is called {name}")

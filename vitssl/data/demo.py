"""The demo set: small drawn scenes in which only the outline of one object tells the class.

It exists so that a newcomer can pretrain, probe and fine-tune within minutes, with nothing to download. Everything but the
outline is a *factor*: colours, textures, pose, light, clutter, occlusion and noise come from a random stream that never sees
the label, so neither a colour histogram nor a pixel-wise neighbour can tell the class, and a few labels are not enough to
learn what an outline is. Classes survive rotation and mirroring. Surprising: this file reads no image and imports no torch;
webdataset, which does import it, is loaded only where a shard is written, and that is in a worker process.
"""

import io
import json
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from vitssl.errors import DataError

CLASSES: tuple[str, ...] = (
    "arrow", "bolt", "crescent", "cross", "flower", "gear", "heart", "hourglass", "key", "ring", "spiral", "star",
)  # fmt: skip
VERSION = 1  # of the pictures: raise it whenever a change alters a pixel
SHARD_SAMPLES = 2_000
TEST_START = len(CLASSES) << 40  # test images are drawn from here on: no training set reaches it, and class blocks stay whole

_SUPERSAMPLE = 4
_PIECE = 250  # samples per piece of work: small enough to keep processes evenly busy, large enough to hide the hand-over
_SHAPE, _SCENE, _LABELS = 1, 2, 3  # the random streams of one image

Loop = np.ndarray  # [points, 2] float64, a closed line inside the unit disc


def draw(index: int, *, size: int = 32, seed: int = 0) -> tuple[np.ndarray, int, dict]:
    """One image of the set, a pure function of (seed, index, size).

    Returns:
        uint8 [size, size, 3]; the label, an index into :data:`CLASSES`; the factors the scene was drawn with.
        Any ``len(CLASSES)`` images that start at a multiple of it hold every class once.
    """
    block, place = divmod(index, len(CLASSES))
    label = int(np.random.default_rng([seed, block, _LABELS]).permutation(len(CLASSES))[place])
    outline = _OUTLINES[CLASSES[label]](np.random.default_rng([seed, index, _SHAPE]))
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
    """Write ``train-*.tar``, ``test-*.tar`` and ``about.json`` into ``folder``; return at once if they are already there.

    The folder appears whole, by one rename, with the same bytes every time (for one version of Pillow).

    Args:
        processes: worker processes; default one per CPU. 0 draws and writes in this process, which then imports torch.
        progress: called with (samples done, samples in all).

    Raises:
        DataError: ``folder`` holds something else.
    """
    folder = Path(folder)
    about = {
        "classes": list(CLASSES), "num_train": num_train, "num_test": num_test, "size": size, "seed": seed, "version": VERSION,
    }  # fmt: skip
    if _complete(folder, about):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if processes == 0:
            _write(map, unfinished, about, progress)
        else:
            # Not fork: the caller may hold threads, locks or a GPU.
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=spawn) as pool:
                try:
                    _write(pool.map, unfinished, about, progress)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        (unfinished / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        unfinished.chmod(0o755)  # mkdtemp's 0700 would hide the set from everyone else
        _publish(unfinished, folder, about)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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


def _publish(unfinished: Path, folder: Path, about: dict) -> None:
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster: fine, if it drew the same set
        if not _complete(folder, about):
            raise


def _write(mapped: Callable, folder: Path, about: dict, progress: Callable[[int, int], None] | None) -> None:
    """Draw all samples in pieces, then write the shards; ``mapped`` is ``map``, here or over processes."""
    splits = (("train", 0, about["num_train"]), ("test", TEST_START, about["num_test"]))
    pieces = [
        (f"{split}-{start // SHARD_SAMPLES:06d}.tar", first + start, min(_PIECE, num - start))
        for split, first, num in splits
        for start in range(0, num, _PIECE)
    ]
    shards: dict[str, list[dict]] = {}
    done, total = 0, about["num_train"] + about["num_test"]
    draw_piece = partial(_draw_piece, size=about["size"], seed=about["seed"])
    for (shard, _, num), samples in zip(pieces, mapped(draw_piece, pieces), strict=True):
        shards.setdefault(shard, []).extend(samples)
        done += num
        if progress is not None:
            progress(done, total)
    for _ in mapped(_write_shard, [folder / shard for shard in shards], shards.values()):
        pass


def _draw_piece(piece: tuple[str, int, int], *, size: int, seed: int) -> list[dict]:
    """``(shard, first, num)`` -> webdataset samples, keyed ``<split>-<number in the split>``."""
    shard, first, num = piece
    split = shard.partition("-")[0]
    samples = []
    for index in range(first, first + num):
        pixels, label, _ = draw(index, size=size, seed=seed)
        stream = io.BytesIO()
        # Full-resolution chroma: at 32 pixels the usual 4:2:0 would blur colours over half an object.
        Image.fromarray(pixels).save(stream, "JPEG", quality=92, subsampling=0)
        samples.append({"__key__": f"{split}-{index % TEST_START:08d}", "jpg": stream.getvalue(), "cls": str(label).encode()})
    return samples


def _write_shard(path: Path, samples: list[dict]) -> None:
    from webdataset import TarWriter

    with path.open("wb") as stream, TarWriter(stream, user="vitssl", group="vitssl", mode=0o644, mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write(sample)
        stream.flush()
        os.fsync(stream.fileno())


def _scene(outline: list[Loop], rng: Generator, size: int) -> tuple[np.ndarray, dict]:
    """Place, colour, light and disturb one outline. Everything is drawn from ``rng``, which knows nothing of the class."""
    back, front = _colours(rng)
    image, background = _surface(rng, back, size)
    num_under, num_over = int(rng.integers(0, 4)), int(rng.random() < 0.3)
    for _ in range(num_under):
        _blend(image, _fragment(rng, size), _ink(rng))
    pose = _pose(rng)
    mask = _mask(_placed(outline, pose, size), size, width=None)
    shadow = float(rng.uniform(0.0, 0.5)) if rng.random() < 0.5 else 0.0
    if shadow:
        shift = tuple(round(v) for v in rng.uniform(-0.07, 0.07, 2) * size)
        _blend(image, shadow * np.roll(_blur(mask, 0.04 * size), shift, (0, 1)), np.zeros(3))
    surface, texture = _surface(rng, front, size)
    _blend(image, mask, surface)
    for _ in range(num_over):
        _blend(image, _stroke(rng, size), _ink(rng))
    light = rng.uniform(-0.2, 0.2, 2)
    image *= (1.0 + light[0] * _axis(size)[:, None] + light[1] * _axis(size)[None, :])[..., None]
    noise = float(rng.uniform(0.0, 0.008))
    image += noise * rng.standard_normal(image.shape)
    factors = {
        **pose, "back": back.tolist(), "front": front.tolist(), "background": background, "texture": texture,
        "under": num_under, "over": num_over, "shadow": shadow, "light": light.tolist(), "noise": noise,
    }  # fmt: skip
    return np.rint(image.clip(0.0, 1.0) * 255.0).astype(np.uint8), factors


def _pose(rng: Generator) -> dict:
    """Side (the square root of the area) and centre in image sides, angle in radians, squeeze and shear as factors."""
    x, y = rng.uniform(0.32, 0.68, 2).tolist()
    return {
        "side": float(rng.uniform(0.34, 0.46)), "x": x, "y": y, "angle": float(rng.uniform(0.0, math.tau)),
        "squeeze": float(rng.uniform(0.8, 1.0)), "shear": float(rng.uniform(-0.2, 0.2)),
    }  # fmt: skip


def _placed(outline: list[Loop], pose: dict, size: int) -> list[Loop]:
    """The outline's loops in pixels. All classes get the same area: how much of each colour there is must not tell them."""
    area = _area(outline[0]) - sum(_area(hole) for hole in outline[1:])
    cos, sin = math.cos(pose["angle"]), math.sin(pose["angle"])
    warp = np.array([[1.0, pose["shear"]], [0.0, pose["squeeze"]]])
    matrix = pose["side"] * size / math.sqrt(area * pose["squeeze"]) * np.array([[cos, -sin], [sin, cos]]) @ warp
    return [loop @ matrix.T + np.array([pose["x"], pose["y"]]) * size for loop in outline]


def _area(loop: Loop) -> float:
    x, y = loop.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def _mask(loops: list[Loop], size: int, *, width: float | None) -> np.ndarray:
    """float64 [size, size] coverage in [0, 1]: the first loop filled and the others cut out of it, or lines ``width`` wide."""
    canvas = Image.new("L", (size * _SUPERSAMPLE, size * _SUPERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    for number, loop in enumerate(loops):
        points = (loop * _SUPERSAMPLE).ravel().tolist()
        if width is None:
            pen.polygon(points, fill=0 if number else 255)
        else:
            pen.line(points + points[:4], fill=255, width=max(1, round(width * _SUPERSAMPLE)), joint="curve")
    return np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.float64) / 255.0


def _fragment(rng: Generator, size: int) -> np.ndarray:
    """Clutter: a scrap of some outline's boundary, or a small polygon."""
    if rng.random() < 0.5:
        return _stroke(rng, size)
    angles = np.sort(rng.uniform(0.0, math.tau, int(rng.integers(3, 7))))
    scrap = _polar(angles, rng.uniform(0.05, 0.16)) + rng.uniform(0.0, 1.0, 2)
    return _mask([scrap * size], size, width=None)


def _stroke(rng: Generator, size: int) -> np.ndarray:
    """An arc of random bend, thin enough to occlude without erasing."""
    radius, start, sweep = rng.uniform(0.15, 1.2), rng.uniform(0.0, math.tau), rng.uniform(0.3, 0.9)
    arc = _polar(np.linspace(start, start + sweep / radius, 12), radius)
    arc += rng.uniform(0.1, 0.9, 2) - arc.mean(axis=0)
    return _mask([np.concatenate([arc, arc[::-1]]) * size], size, width=rng.uniform(0.03, 0.06) * size)


def _colours(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB colours that can be told apart; which of them is the brighter is chance."""
    while True:
        back, front = _ink(rng), _ink(rng)
        if abs((back - front) @ _LUMA) > 0.2:
            return back, front


def _ink(rng: Generator) -> np.ndarray:
    """One RGB colour near one of the palette: clutter takes from the same pots as object and background."""
    return _PALETTE[int(rng.integers(len(_PALETTE)))] + rng.uniform(-0.05, 0.05, 3)


def _surface(rng: Generator, colour: np.ndarray, size: int) -> tuple[np.ndarray, str]:
    """float64 [size, size, 3] of ``colour`` that runs into a neighbouring one along a texture, and the texture's name."""
    name = _TEXTURES[int(rng.integers(len(_TEXTURES)))]
    x, y = np.meshgrid(_axis(size), _axis(size))
    angle, phase = rng.uniform(0.0, math.tau, 2)
    along = x * math.cos(angle) + y * math.sin(angle)
    waves = rng.uniform(2.0, 5.0) * math.pi
    if name == "gradient":
        field = along
    elif name == "stripes":
        field = np.tanh(3.0 * np.sin(waves * along + phase))
    else:
        cells = int(rng.integers(2, 6))
        coarse = Image.fromarray(rng.uniform(-1.0, 1.0, (cells, cells)).astype(np.float32))
        field = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    return colour + 0.5 * field[..., None] * rng.uniform(-0.1, 0.1, 3), name


def _blend(image: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> None:
    image += mask[..., None] * (colour - image)


def _blur(mask: np.ndarray, radius: float) -> np.ndarray:
    picture = Image.fromarray(np.rint(mask * 255.0).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(picture, dtype=np.float64) / 255.0


def _axis(size: int) -> np.ndarray:
    """[size] pixel centres from -1 to 1."""
    return (np.arange(size) + 0.5) * (2.0 / size) - 1.0


def _polar(angles: np.ndarray, radii: np.ndarray | float) -> Loop:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(radii, (-1, 1))


def _turn(num: int) -> np.ndarray:
    return np.arange(num) * (math.tau / num)


def _arrow(rng: Generator) -> list[Loop]:
    shaft, head, neck = rng.uniform(0.17, 0.26), rng.uniform(0.62, 0.8), rng.uniform(0.0, 0.25)
    half = [(-1.0, shaft), (neck, shaft), (neck, head), (1.0, 0.0)]
    return [np.array(half + [(x, -y) for x, y in half[-2::-1]])]


def _bolt(rng: Generator) -> list[Loop]:
    tip, bar = rng.uniform(0.25, 0.45), rng.uniform(0.12, 0.24)
    half = [(tip, -0.95), (-0.72, bar), (-0.12, bar)]
    return [np.array(half + [(-x, -y) for x, y in half])]


def _crescent(rng: Generator) -> list[Loop]:
    tip, hollow = rng.uniform(0.5, 0.8), rng.uniform(0.2, 0.45)
    outer = _polar(np.linspace(tip, math.tau - tip, 40), 1.0)
    t = np.linspace(-0.5 * math.pi, 0.5 * math.pi, 24)
    inner = np.stack([math.cos(tip) - (math.cos(tip) + hollow) * np.cos(t), math.sin(tip) * np.sin(t)], axis=1)
    return [np.concatenate([outer, inner])]


def _cross(rng: Generator) -> list[Loop]:
    w = rng.uniform(0.22, 0.34)
    quarter = np.array([(w, w), (w, 1.0), (-w, 1.0)])
    turns = [np.array([[0.0, -1.0], [1.0, 0.0]])]
    for _ in range(3):
        turns.append(turns[-1] @ turns[0])
    return [np.concatenate([quarter @ turn.T for turn in turns])]


def _flower(rng: Generator) -> list[Loop]:
    angles, depth = _turn(80), rng.uniform(0.24, 0.32)
    return [_polar(angles, 1.0 - depth + depth * np.cos(5 * angles))]


def _gear(rng: Generator) -> list[Loop]:
    num, valley = int(rng.integers(7, 10)), rng.uniform(0.68, 0.76)
    radii = np.tile([1.0, 1.0, valley, valley], num)
    angles = np.repeat(_turn(num), 4) + np.tile(np.array([-0.2, 0.2, 0.3, 0.7]) * math.tau / num, num)
    return [_polar(angles, radii), _polar(_turn(30), rng.uniform(0.25, 0.36))]


def _heart(rng: Generator) -> list[Loop]:
    t, notch = _turn(60), rng.uniform(4.0, 6.0)
    y = 13.0 * np.cos(t) - notch * np.cos(2 * t) - 2.0 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([16.0 * np.sin(t) ** 3, 2.5 + y], axis=1) / 17.0]


def _hourglass(rng: Generator) -> list[Loop]:
    wide, waist = rng.uniform(0.62, 0.78), rng.uniform(0.08, 0.18)
    return [np.array([(-wide, -0.95), (wide, -0.95), (waist, 0.0), (wide, 0.95), (-wide, 0.95), (-waist, 0.0)])]


def _key(rng: Generator) -> list[Loop]:
    bow, shaft, tooth = rng.uniform(0.42, 0.5), rng.uniform(0.14, 0.18), rng.uniform(0.42, 0.52)
    joint = math.asin(shaft / bow)
    bits = [(1.0, -shaft), (1.0, tooth), (0.78, tooth), (0.78, shaft), (0.6, shaft), (0.6, tooth), (0.38, tooth), (0.38, shaft)]
    head = _polar(np.linspace(joint, math.tau - joint, 30), bow) - np.array([0.55, 0.0])
    return [np.concatenate([head, np.array(bits)]), _polar(_turn(20), 0.42 * bow) - np.array([0.55, 0.0])]


def _ring(rng: Generator) -> list[Loop]:
    return [_polar(_turn(48), 1.0), _polar(_turn(36), rng.uniform(0.45, 0.65))]


def _spiral(rng: Generator) -> list[Loop]:
    t = np.linspace(0.0, 1.0, 60)
    turns, width = math.tau * rng.uniform(1.6, 1.9), rng.uniform(0.13, 0.16)
    middle = 0.1 + (0.9 - width) * t
    return [np.concatenate([_polar(turns * t, middle + width), _polar(turns * t, middle - width)[::-1]])]


def _star(rng: Generator) -> list[Loop]:
    return [_polar(_turn(10), np.tile([1.0, rng.uniform(0.38, 0.48)], 5))]


_OUTLINES: dict[str, Callable[[Generator], list[Loop]]] = {
    "arrow": _arrow, "bolt": _bolt, "crescent": _crescent, "cross": _cross, "flower": _flower, "gear": _gear, "heart": _heart,
    "hourglass": _hourglass, "key": _key, "ring": _ring, "spiral": _spiral, "star": _star,
}  # fmt: skip
_TEXTURES = ("gradient", "stripes", "clouds")
_PALETTE = np.array([
    (0.96, 0.93, 0.85), (0.13, 0.14, 0.20), (0.85, 0.27, 0.22), (0.95, 0.73, 0.25),
    (0.20, 0.55, 0.50), (0.22, 0.35, 0.65), (0.60, 0.80, 0.90), (0.50, 0.28, 0.50),
])  # fmt: skip
_LUMA = np.array([0.299, 0.587, 0.114])

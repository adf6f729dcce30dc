"""Decoding any mode, crops with torchvision's distribution, and randomness that belongs to the sample alone."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision import transforms as tv

from vitssl.data import transforms
from vitssl.data.sources import Raw
from vitssl.data.transforms import NUM_DRAWS, crop_box, decode, draw_numbers, show
from vitssl.errors import ConfigError, DataError
from vitssl.views import View

MIDDLE = [0.5] * transforms.NUM_DRAWS


def saved(image: Image.Image, format: str, **options: object) -> Raw:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return Raw(key="k", image=buffer.getvalue(), label=None, where="s.tar: k.png (byte 512)")


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    return image


def left_of(mode: str, value: object, format: str, **options: object) -> Raw:
    return saved(Image.new(mode, (2, 2), value), format, **options)


def sixteen_bit(format: str) -> Raw:
    return saved(Image.fromarray(np.full((2, 2), 0x8142, dtype=np.uint16)), format)


def animated() -> Raw:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


MODES = {
    "RGB": (lambda: left_of("RGB", (1, 2, 3), "PNG"), (1, 2, 3)),
    "L": (lambda: left_of("L", 77, "PNG"), (77, 77, 77)),
    "1": (lambda: left_of("1", 1, "PNG"), (255, 255, 255)),
    "LA, half seen": (lambda: left_of("LA", (100, 128), "PNG"), (177, 177, 177)),
    "RGBA, seen": (lambda: left_of("RGBA", (1, 2, 3, 255), "PNG"), (1, 2, 3)),
    "RGBA, unseen": (lambda: left_of("RGBA", (1, 2, 3, 0), "PNG"), (255, 255, 255)),
    "P": (lambda: saved(palette_image(), "PNG"), (10, 20, 30)),
    "P, transparent": (lambda: saved(palette_image(), "PNG", transparency=0), (255, 255, 255)),
    "P, transparency in bytes": (lambda: saved(palette_image(), "PNG", transparency=b"\xff\x00"), (10, 20, 30)),
    "RGB, transparent colour": (lambda: left_of("RGB", (1, 2, 3), "PNG", transparency=(1, 2, 3)), (255, 255, 255)),
    "L, transparent 0": (lambda: left_of("L", 0, "PNG", transparency=0), (255, 255, 255)),
    "CMYK": (lambda: left_of("CMYK", (0, 255, 255, 0), "TIFF"), (255, 0, 0)),
    "CMYK JPEG": (lambda: left_of("CMYK", (0, 255, 255, 0), "JPEG", quality=100), (255, 0, 0)),
    "YCbCr": (lambda: left_of("YCbCr", (100, 128, 128), "TIFF"), (100, 100, 100)),
    "16 bits PNG": (lambda: sixteen_bit("PNG"), (0x81,) * 3),
    "16 bits TIFF": (lambda: sixteen_bit("TIFF"), (0x81,) * 3),
    "32 bits": (lambda: left_of("I", 0x8142, "TIFF"), (0x81,) * 3),
    "32 bits, beyond": (lambda: left_of("I", 70_000, "TIFF"), (255,) * 3),
    "animated": (animated, (255, 0, 0)),
    "WEBP": (lambda: left_of("RGB", (1, 2, 3), "WEBP", lossless=True), (1, 2, 3)),
    "BMP": (lambda: left_of("RGB", (1, 2, 3), "BMP"), (1, 2, 3)),
    "PPM": (lambda: left_of("RGB", (1, 2, 3), "PPM"), (1, 2, 3)),
}


@pytest.mark.parametrize("mode", MODES)
def test_any_mode_becomes_rgb(mode: str) -> None:
    make, expected = MODES[mode]
    image = decode(make())
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    assert np.abs(np.subtract(image[0, 0], expected, dtype=int)).max() <= (1 if "JPEG" in mode else 0)


@pytest.mark.parametrize("mode, options", [("RGB", {}), ("L", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0}),
                                           ("CMYK", {}), ("RGB", {"keep_rgb": True})])  # fmt: skip
def test_jpeg_decodes_as_pil_decodes_it(mode: str, options: dict) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((75, 61), Image.Resampling.BICUBIC).convert(mode)
    raw = saved(picture, "JPEG", quality=90, **options)
    theirs = np.asarray(Image.open(io.BytesIO(raw.image)).convert("RGB")).astype(int)
    assert decode(raw).shape == (61, 75, 3) and np.abs(decode(raw).astype(int) - theirs).mean() < 0.2
    assert decode(raw._replace(image=raw.image + b"beyond the end")).shape == (61, 75, 3)


def test_channels() -> None:
    assert decode(left_of("RGB", (90, 90, 90), "PNG"), 1).tolist() == [[[90], [90]]] * 2
    assert decode(left_of("L", 0, "PNG", transparency=0), 1)[0, 0].tolist() == [255]
    assert decode(left_of("LA", (90, 5), "PNG"), 4)[0, 0].tolist() == [90, 90, 90, 5]
    with pytest.raises(ConfigError, match=r"1, 3 or 4 channels, not 5; set the encoder's channels"):
        decode(left_of("L", 0, "PNG"), 5)


GOOD = saved(Image.effect_noise((60, 60), 50).convert("RGB"), "JPEG")
BAD = {
    "no bytes": (b"", r"is empty; replace it or take it out"),
    "text": (b"hello", r"is no image of a known format \(5 bytes\); replace"),
    "cut": (GOOD.image[: len(GOOD.image) // 2], r"does not decode \(.*truncated.*\); replace it or take it out"),
    "cut in the header": (GOOD.image[:30], r"(does not decode|is no image)"),
    "float pixels": (left_of("F", 0.5, "TIFF").image, r"does not decode \(floating-point pixels have no stated range; store 8"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", r"is no image of a known format"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_decode_is_named(kind: str) -> None:
    content, message = BAD[kind]
    with pytest.raises(DataError, match=r"^s\.tar: k\.png \(byte 512\): " + message) as error:
        decode(GOOD._replace(image=content))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [3599, 1000])  # PIL warns of the first and raises for the second by itself
def test_too_many_pixels(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"has more than [\d,]+ pixels \(data\.max_pixels\); shrink it or take it out"):
        decode(GOOD, max_pixels=limit)
    assert decode(GOOD, max_pixels=3600).shape == (60, 60, 3), "PIL's own limit is not in the way of the user's"


def test_too_many_pixels_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(GOOD.image)
    program = """if True:
        from vitssl.data import transforms
        from vitssl.data.sources import FolderSource
        transforms.MAX_PIXELS = transforms.Image.MAX_IMAGE_PIXELS = 3599
        try:
            transforms.decode(FolderSource(".").read([0])[0])
        except transforms.DataError:
            pass
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


VIEWS = st.builds(
    View,
    size=st.tuples(st.integers(1, 48), st.integers(1, 48)),
    scale=st.sampled_from([(0.08, 1.0), (0.2, 1.0), (0.9, 1.0), (1.0, 1.0), (1e-6, 1e-5), None]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.1, 0.2), (5.0, 9.0)]),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    resize=st.sampled_from([None, 5, 40]),
)
NUMBERS = st.lists(st.one_of(st.floats(0, 1, exclude_max=True), st.just(1 - 2**-53)), min_size=23, max_size=23)


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), view=VIEWS.filter(lambda view: view.scale), numbers=NUMBERS)
def test_crops_lie_inside_the_image(width: int, height: int, view: View, numbers: list[float]) -> None:
    left, top, w, h = crop_box(width, height, view, numbers)
    assert all(isinstance(number, int) for number in (left, top, w, h))
    assert w >= 1 and h >= 1 and left >= 0 and top >= 0 and left + w <= width and top + h <= height


@settings(max_examples=80, deadline=None)
@given(width=st.integers(1, 60), height=st.integers(1, 60), view=VIEWS, numbers=NUMBERS)
def test_views_have_their_size_whatever_the_image(width: int, height: int, view: View, numbers: list[float]) -> None:
    for channels in (3, 1, 4):
        pixels = show(np.full((height, width, channels), 255, dtype=np.uint8), view, numbers)
        assert pixels.shape == (*view.size, channels) and pixels.dtype == np.uint8
        assert (pixels == 255).all()  # no border is padded with anything


@pytest.mark.parametrize(
    ("width", "height", "scale", "ratio"),
    [(32, 32, (0.2, 1.0), (3 / 4, 4 / 3)), (500, 333, (0.08, 1.0), (3 / 4, 4 / 3)), (90, 400, (0.3, 1.0), (3 / 4, 4 / 3)),
     (64, 64, (0.9, 1.0), (0.5, 2.0))],
)  # fmt: skip
def test_crops_have_torchvisions_distribution(width: int, height: int, scale: tuple, ratio: tuple) -> None:
    num = 6000
    rows = draw_numbers(View((32, 32), scale, ratio), seed=0, positions=np.arange(num)).tolist()
    ours = np.array([crop_box(width, height, View((32, 32), scale, ratio), row) for row in rows], dtype=float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([tv.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(num)], dtype=float)[:, [1, 0, 3, 2]]

    def statistics(boxes: np.ndarray) -> np.ndarray:
        left, top, w, h = boxes.T
        area, log_ratio = w * h, np.log(w / h)
        return np.stack([left, top, w, h, area, log_ratio, area**2, log_ratio**2, left * w, top * h, left * top], axis=1)

    ours, theirs = statistics(ours), statistics(theirs)
    error = np.sqrt(ours.var(0) / num + theirs.var(0) / num) + 1e-9
    assert (np.abs(ours.mean(0) - theirs.mean(0)) / error).max() < 4.5


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (40, 40)])
def test_fallback_is_torchvisions_centre_crop(width: int, height: int) -> None:
    view = View((8, 8), scale=(3.0, 3.0))  # never fits
    i, j, h, w = tv.RandomResizedCrop.get_params(torch.empty(3, height, width), [3.0, 3.0], list(view.ratio))
    assert crop_box(width, height, view, MIDDLE) == (j, i, w, h)


def near(ours: np.ndarray, theirs: Image.Image) -> None:
    """Equal to PIL's but for a last bit here and there, and a few of a noise's pixels where a cubic overshoots and is cut."""
    difference = np.abs(ours.astype(int) - np.asarray(theirs).astype(int))
    assert ours.shape == np.asarray(theirs).shape and difference.mean() < 0.5 and (difference > 1).mean() < 0.05


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos", "box"])
def test_crop_then_resize_as_torchvision_does_on_pil(interpolation: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    view = View((20, 28), scale=(0.2, 1.0), interpolation=interpolation)
    numbers = draw_numbers(view, seed=0, positions=[7])[0].tolist()
    left, top, w, h = crop_box(70, 50, view, numbers)
    picture, mode = Image.fromarray(image), tv.InterpolationMode(interpolation)
    near(show(image, view, numbers), tv.functional.resized_crop(picture, top, left, h, w, list(view.size), mode))


@pytest.mark.parametrize(("width", "height"), [(70, 50), (51, 90), (32, 32), (20, 21), (333, 500), (7, 300)])
@pytest.mark.parametrize(("size", "resize"), [(32, 36), (32, None), (24, 27)])
def test_deterministic_view_is_resize_and_centre_crop(width: int, height: int, size: int, resize: int | None) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    oracle = tv.Compose([tv.Resize(resize or size, tv.InterpolationMode.BICUBIC), tv.CenterCrop(size)])
    near(show(image, View((size, size), resize=resize), MIDDLE), oracle(Image.fromarray(image)))


def test_deterministic_view_covers_a_size_that_is_not_square() -> None:
    columns = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (50, 100, 3))
    pixels = show(np.ascontiguousarray(columns), View((50, 40)), MIDDLE)
    assert np.array_equal(pixels[0, :, 0], np.arange(30, 70))  # the middle, neither stretched nor padded
    assert show(np.zeros((50, 100, 3), dtype=np.uint8), View((10, 80)), MIDDLE).shape == (10, 80, 3)


def test_flip_is_a_mirror_with_its_probability() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    rows = draw_numbers(View((9, 9), flip=0.3), seed=1, positions=np.arange(2000)).tolist()
    flipped = [np.array_equal(show(image, View((9, 9), flip=0.3), row), image[:, ::-1]) for row in rows]
    assert 0.3 - 0.04 < np.mean(flipped) < 0.3 + 0.04
    assert all(np.array_equal(show(image, View((9, 9)), row), image) for row in rows[:50])


def test_numbers_belong_to_the_position_and_the_view() -> None:
    view, other = View((32, 32), scale=(0.2, 1.0)), View((32, 32), scale=(0.2, 1.0), copy=1)
    together = draw_numbers(view, seed=3, positions=[5, 10**12, 7])
    assert together.shape == (3, 23) and together.dtype == np.float64
    assert np.array_equal(draw_numbers(view, seed=3, positions=[7])[0], together[2])
    for different in (draw_numbers(other, seed=3, positions=[7]), draw_numbers(view, seed=4, positions=[7])):
        assert not np.isin(different, together).any()


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (40_000, 3)])
def test_a_thin_image_is_cut_before_it_is_enlarged(size: tuple[int, int]) -> None:
    """Resized whole, 20,000 x 1 pixels would have 4.5 million columns at a height of 224."""
    pixels = np.arange(size[0] * size[1], dtype=np.uint32).astype(np.uint8).reshape(size[1], size[0])
    shown = show(np.repeat(pixels[:, :, None], 3, axis=2), View((224, 224)), [0.9] * NUM_DRAWS)
    assert shown.shape == (224, 224, 3) and shown.std() >= 0


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_stand_upright_on_request(format: str, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, format=format, exif=exif, quality=95)
    raw = Raw("k", buffer.getvalue(), None, "w")
    plain = decode(raw)
    assert plain.shape == (48, 80, 3)
    expected = np.array(ImageOps.exif_transpose(Image.open(buffer)))
    found = decode(raw, exif=True)
    assert found.shape == expected.shape and found.flags.c_contiguous
    assert np.abs(found.astype(int) - expected).max() <= 1  # two JPEG decoders round differently


def test_too_many_pixels_are_judged_by_the_header() -> None:
    for format in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        Image.new("RGB", (30, 20)).save(buffer, format=format)
        raw = Raw("k", buffer.getvalue()[:-5], None, "w")  # would not decode either
        with pytest.raises(DataError, match=r"w: has more than 599 pixels \(data\.max_pixels\)"):
            decode(raw, max_pixels=599)


def test_draws_cover_what_is_used() -> None:
    used: set[int] = set()

    class Spy(list):
        def __getitem__(self, at: int) -> float:
            used.add(at)
            return 0.5

    show(np.zeros((9, 9, 3), np.uint8), View((4, 4), scale=(3.0, 3.0)), Spy())
    show(np.zeros((9, 9, 3), np.uint8), View((4, 4), scale=(0.5, 0.5), flip=0.5), Spy())
    assert used == set(range(transforms.NUM_DRAWS))

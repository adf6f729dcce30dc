"""Normalisation there and back, and timm's RandAugment as a function of its seed."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from vitssl.data import transforms
from vitssl.data.augment import Normalize, rand_augment
from vitssl.data.transforms import show
from vitssl.errors import ConfigError
from vitssl.views import View

MIDDLE = [0.5] * transforms.NUM_DRAWS


def test_normalize() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3)[: 2 * 3 * 8 * 16].reshape(2, 3, 8, 16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = tv.functional.normalize(images.double() / 255, mean.double(), std.double())
    normalize = Normalize(mean.tolist(), std.tolist(), channels=3)
    result = normalize(images)
    assert result.dtype == torch.float32 and images.dtype == torch.uint8
    assert torch.allclose(result.double(), expected, atol=1e-6)
    assert torch.allclose(normalize.restore(result) * 255, images.float(), atol=1e-4)
    assert normalize.restore(result + 100).max() == 1 and not normalize.state_dict()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))


def test_rand_augment_is_a_function_of_its_seed_and_leaves_global_generators_alone(picture: Image.Image) -> None:
    augment = rand_augment("rand-m9-mstd0.5-inc1", mean=(0.485, 0.456, 0.406), size=24)
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    results = [np.asarray(augment(picture, seed)).tobytes() for seed in range(12)]
    assert (random.random(), np.random.rand()) == expected
    assert len(set(results)) > 8
    again = pickle.loads(pickle.dumps(augment))
    assert [np.asarray(again(picture, seed)).tobytes() for seed in range(12)] == results


def test_rand_augment_reaches_the_view_after_its_flip(picture: Image.Image) -> None:
    view = View((24, 24), flip=1.0)
    seen = []

    def augment(image: Image.Image, seed: int) -> Image.Image:
        seen.append((np.asarray(image), seed))
        return Image.new("RGB", image.size, "red")

    pixels = show(np.asarray(picture), view, MIDDLE, augment=augment, augment_seed=17)
    assert seen[0][1] == 17 and np.array_equal(seen[0][0], np.asarray(picture)[:, ::-1])
    assert (pixels == [255, 0, 0]).all()


@pytest.mark.parametrize("config", ["rand-m10-p1", "rand-m10-p1-inc1", "rand-m20-p1-mmax20-inc1"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_operation_at_its_largest_magnitude(picture: Image.Image, mode: str, config: str) -> None:
    """Posterising to 0 bits is a black image, as it was with the Pillow of the official codes; newer ones refuse it."""
    augment = rand_augment(config, mean=(0.485, 0.456, 0.406) if mode == "RGB" else (0.5,), size=24)
    assert len(augment._transform.ops) == 15
    for operation in pickle.loads(pickle.dumps(augment))._transform.ops:
        shown = operation(picture.convert(mode))
        assert shown.mode == mode and shown.size == picture.size
        if operation.name == "PosterizeIncreasing":
            assert not np.asarray(shown).any()


@pytest.mark.parametrize("config", ["rnd-m9", "rand-q9", "rand-mx", "rand-m1.5", "rand-tnone"])
def test_rand_augment_refuses_what_timm_does_not_know(config: str) -> None:
    with pytest.raises(ConfigError, match=r"is no RandAugment of timm.*; write for example rand-m9-mstd0.5-inc1"):
        rand_augment(config, mean=(0.5,))

"""Colours on the device: torchvision's operations, sample by sample, whatever batch they are in."""

import itertools
from collections import Counter

import pytest
import torch
from torchvision.transforms import functional as tv

from vitssl.data import photometric as module
from vitssl.data.augment import Normalize, seen
from vitssl.data.photometric import NUM_DRAWS, photometric
from vitssl.task import Batch
from vitssl.views import Photometric, View

JITTER = Photometric(jitter=1.0, brightness=0.4, contrast=0.5, saturation=0.6, hue=0.5)
ALL = Photometric(jitter=0.8, grey=0.2, blur=0.5, solarize=0.2)


def images(number: int, size: tuple[int, int] = (30, 22), seed: int = 0) -> torch.Tensor:
    """Smooth coloured pictures with some flat, grey, black and white places."""
    coarse = torch.rand(number, 3, 5, 4, generator=torch.Generator().manual_seed(seed))
    found = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    found[:, :, :4, :4], found[:, :, :4, 4:8], found[:, :, :4, 8:12] = 0.0, 1.0, 0.5
    return found


def numbers(number: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(number, NUM_DRAWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OPERATIONS = {
    "brightness": (module._brightness, tv.adjust_brightness, (0.0, 0.6, 1.0, 1.4)),
    "contrast": (module._contrast, tv.adjust_contrast, (0.0, 0.6, 1.0, 1.4)),
    "saturation": (module._saturation, tv.adjust_saturation, (0.0, 0.6, 1.0, 1.4)),
    "hue": (module._hue_forth, tv.adjust_hue, (0.0, 0.03, 0.1, 1 / 6)),
    "hue, back": (module._hue_back, lambda image, turn: tv.adjust_hue(image, -turn), (0.0, 0.03, 0.1, 1 / 6)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_torchvision_s_operations(name: str) -> None:
    mine, theirs, factors = OPERATIONS[name]
    for factor in factors:
        found, expected = images(3), theirs(images(3), factor)
        mine(found, torch.full((3, 1, 1, 1), factor))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)  # its red weighs 0.2989


def test_the_other_operations() -> None:
    found = photometric(images(2), Photometric(grey=1.0), numbers(2))
    torch.testing.assert_close(found, tv.rgb_to_grayscale(images(2), 3), rtol=0, atol=1e-3)  # theirs are 0.2989, 0.587, 0.114
    every = torch.arange(256).expand(3, 2, 256)[None].to(torch.uint8)
    found = photometric(every / 255, Photometric(solarize=1.0), numbers(1))
    torch.testing.assert_close(found * 255, tv.solarize(every, 128).float())
    draw = numbers(2)
    for sigma, expected in zip(0.1 + 1.9 * draw[:, 11], photometric(images(2), Photometric(blur=1.0), draw), strict=True):
        row = 0 if torch.equal(sigma, 0.1 + 1.9 * draw[0, 11]) else 1
        theirs = tv.gaussian_blur(images(2)[row], [13, 13], [float(sigma)] * 2)
        torch.testing.assert_close(expected[:, 6:-6, 6:-6], theirs[:, 6:-6, 6:-6], rtol=0, atol=3e-3)  # cut at 3 sigma


def slow_jitter(image: torch.Tensor, change: Photometric, row: list[float]) -> torch.Tensor:
    """One image, by torchvision, in plain words."""
    if row[0] >= change.jitter:
        return image
    operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    strengths = [change.brightness, change.contrast, change.saturation, change.hue]
    for number in sorted(range(4), key=lambda each: row[5 + each]):
        turn = (2 * row[1 + number] - 1) * strengths[number]
        image = operations[number](image, turn if number == 3 else max(0.0, 1 + turn))
    return image


def test_jitter_is_torchvision_s_in_an_order_of_each_sample_s_own() -> None:
    draw = numbers(60)
    found = photometric(images(60), JITTER, draw)
    expected = torch.stack([slow_jitter(image, JITTER, row) for image, row in zip(images(60), draw.tolist(), strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)
    orders = Counter(map(tuple, numbers(4000)[:, 5:9].argsort(dim=1).tolist()))
    assert set(orders) == set(itertools.permutations(range(4))) and min(orders.values()) > 100


def test_a_sample_is_the_same_in_any_batch_and_in_groups() -> None:
    draw = numbers(40)
    together = photometric(images(40), ALL, draw)
    alone = [photometric(images(40)[[row]], ALL, draw[[row]])[0] for row in range(40)]
    assert torch.equal(together, torch.stack(alone))
    assert together.min() >= 0 and together.max() <= 1
    grouped = images(40)  # as on a GPU: all samples of an operation at once
    for step in module._together([module._plan(ALL, row) for row in draw.tolist()]):
        for operation, (chosen, parameters) in step.items():
            some = grouped[chosen]
            operation(
                some, torch.tensor(parameters)[:, None, None, None], *([max(parameters)] if operation is module._blur else [])
            )
            grouped[chosen] = some
    torch.testing.assert_close(grouped, together, rtol=0, atol=2e-3)  # small blurs are cut earlier where they stand alone


def test_how_often() -> None:
    draw = numbers(2000)
    before = images(1, size=(16, 16)).expand(2000, -1, -1, -1)
    for change, share in ((Photometric(jitter=0.8), 0.8), (Photometric(grey=0.2), 0.2), (Photometric(solarize=0.3), 0.3)):
        after = photometric(before.clone(), change, draw)
        assert ((after != before).flatten(1).any(dim=1).double().mean() - share).abs() < 0.03
    assert torch.equal(photometric(before.clone(), Photometric(), draw), before) and not Photometric().changes


def test_a_view_s_colours_follow_seed_and_position_and_leave_its_crop() -> None:
    plain, coloured = View((30, 22), scale=(0.2, 1.0)), View((30, 22), scale=(0.2, 1.0), photometric=ALL)
    assert plain.purpose == coloured.purpose and plain != coloured and sorted([coloured, plain])
    pixels, same = (images(6) * 255).to(torch.uint8), Normalize([0.0] * 3, [1.0] * 3, channels=3)
    positions = torch.tensor([5, 10**12, 7, 8, 9, 10])
    batch = Batch(views={plain: pixels, coloured: pixels}, positions=positions)
    assert torch.equal(seen(batch, plain, same, seed=1), pixels.float() / 255)
    found = seen(batch, coloured, same, seed=1)
    assert not torch.equal(found, seen(batch, coloured, same, seed=2))
    some = Batch(views={coloured: pixels[[1, 4]]}, positions=positions[[1, 4]])
    assert torch.equal(seen(some.to("cpu"), coloured, same, seed=1), found[[1, 4]])
    assert torch.equal(pixels, (images(6) * 255).to(torch.uint8)), "what was delivered is left as it is"
    other = Normalize([0.5] * 3, [0.25] * 3, channels=3)
    torch.testing.assert_close(seen(batch, coloured, other, seed=1), (found - 0.5) / 0.25)
    with pytest.raises(ValueError, match="of 3 channels, not 1"):
        photometric(images(2)[:, :1], ALL, numbers(2))


@pytest.mark.parametrize("sigma", [0.4, 2.0, 5.0])
def test_blurs_together_are_those_alone(sigma: float) -> None:
    alone, together = images(2), images(2)
    module._blur(alone, sigma)
    module._blur(together, torch.full((2, 1, 1, 1), sigma), sigma)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)

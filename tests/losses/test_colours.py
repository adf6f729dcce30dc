"""Mean colours of patches, pixel by pixel."""

import pytest
import torch

from vitssl.losses.colours import mean_colours


@pytest.mark.parametrize("channels, bits", [(3, 3), (1, 3), (4, 2), (3, 1)])
def test_mean_colours_by_a_slow_oracle(channels: int, bits: int):
    images = torch.rand(3, channels, 8, 12, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    images[1] = images[1] ** 4  # dark
    images[2, :, :4] = 1.0  # white belongs to the last part
    found = mean_colours(images, (4, 3), bits=bits)
    for b in range(3):
        for n in range(8):
            row, column = 4 * (n // 4), 3 * (n % 4)
            colour = 0
            for channel in range(channels):
                pixels = [images[b, channel, row + i, column + j].item() for i in range(4) for j in range(3)]
                colour = colour * 2**bits + min(int(sum(pixels) / 12 * 2**bits), 2**bits - 1)
            assert found[b, n] == colour
    assert (found[2, :4] == 2 ** (bits * channels) - 1).all()
    assert len(found.unique()) > 4


def test_colours_are_512():
    grey = torch.arange(8).repeat_interleave(2) / 8 + 1 / 16
    images = torch.stack([grey.expand(2, 16), torch.full((2, 16), 0.99), torch.zeros(2, 16)])[None]
    assert mean_colours(images, (2, 2)).tolist() == [[red * 64 + 7 * 8 for red in range(8)]]

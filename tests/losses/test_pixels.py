"""Pixels as targets, against slow oracles and the official numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitssl.losses.pixels import masked_mse, normalize_patches, patchify, unpatchify

GOLDEN = Path(__file__).parents[1] / "golden" / "mae"


@pytest.mark.parametrize("shape, patch", [((2, 3, 8, 12), (4, 4)), ((1, 1, 6, 4), (3, 2)), ((2, 4, 4, 4), (4, 4))])
def test_patchify_by_a_slow_oracle_and_back(shape: tuple, patch: tuple):
    images = torch.randn(shape)
    rows, columns = shape[2] // patch[0], shape[3] // patch[1]
    patches = patchify(images, patch)
    for b in range(shape[0]):
        for r in range(rows):
            for c in range(columns):
                cut = images[b, :, r * patch[0] : (r + 1) * patch[0], c * patch[1] : (c + 1) * patch[1]]
                numbers = [cut[k, i, j] for i in range(patch[0]) for j in range(patch[1]) for k in range(shape[1])]
                assert torch.equal(patches[b, r * columns + c], torch.stack(numbers))
                first = patchify(images, patch, channels_first=True)[b, r * columns + c]
                assert torch.equal(first, cut.flatten())
    assert torch.equal(unpatchify(patches, patch, (rows, columns)), images)
    by_channel = patchify(images, patch, channels_first=True)
    assert torch.equal(unpatchify(by_channel, patch, (rows, columns), channels_first=True), images)


def test_patchify_equals_mae():
    images = load_file(GOLDEN / "inputs.safetensors")["imgs"].double()
    assert torch.equal(patchify(images, (4, 4)), load_file(GOLDEN / "outputs.safetensors")["patchified"])


def test_the_error_of_each_image_by_a_slow_oracle():
    pred, target, mask = (
        torch.randn(2, 3, 4).double(),
        torch.randn(2, 3, 4).double(),
        torch.tensor([[1, 0, 1], [0, 1, 0]]).bool(),
    )
    errors = [[(pred[b, n] - target[b, n]).square().sum().item() / 4 for n in range(3) if mask[b, n]] for b in range(2)]
    torch.testing.assert_close(
        masked_mse(pred, target, mask, each=True), torch.tensor([sum(e) / len(e) for e in errors]).double()
    )
    every = [error for some in errors for error in some]
    assert masked_mse(pred, target, mask).item() == pytest.approx(sum(every) / len(every))


def test_normalised_patches_can_be_painted_again():
    target = torch.randn(2, 3, 12, dtype=torch.float64) * 5 + 2
    normalised, mean, std = normalize_patches(target)
    torch.testing.assert_close(normalised * std + mean, target)
    row = target[1, 2].tolist()
    centre = sum(row) / 12
    deviation = (sum((x - centre) ** 2 for x in row) / 11 + 1e-6) ** 0.5
    torch.testing.assert_close(normalised[1, 2], torch.tensor([(x - centre) / deviation for x in row], dtype=torch.float64))


def test_a_flat_patch_is_normalised_to_zero():
    normalised, _, std = normalize_patches(torch.full((1, 1, 12), 0.3))
    assert normalised.abs().max() < 1e-3
    assert std.item() == pytest.approx(1e-3)


def test_masked_mse_by_a_slow_oracle():
    pred, target = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()
    errors = [
        sum((pred[b, n, i] - target[b, n, i]).item() ** 2 for i in range(7)) / 7
        for b in range(2)
        for n in range(5)
        if mask[b, n]
    ]
    assert masked_mse(pred, target, mask).item() == pytest.approx(sum(errors) / 4, rel=1e-12)

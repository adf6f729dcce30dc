"""Which patches are corrupted, and how: the mask of BERT (Devlin et al. 2019) as the ViT paper took it over."""

import torch
from torch import Tensor

MASKED, SWAPPED = 0.8, 0.1  # of the corrupted patches; the rest is kept as it is (Dosovitskiy et al. 2021, appendix B.1.2)


def corrupt(noise: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """(places [B, num] int64 of the corrupted patches, masked [B, N] bool, source [B, N] int64).

    noise: [B, 3 x N] uniform. Of the corrupted patches about eight of ten are masked, one stands for a ``source`` other than
    itself, uniform among the image's N - 1 others, and one is kept; everywhere else a patch is its own source. Raises
    ValueError unless 1 <= num <= N and N > 1.
    """
    num_patches = noise.shape[1] // 3
    if not 1 <= num <= num_patches or num_patches < 2 or noise.shape[1] % 3:
        raise ValueError(f"cannot corrupt {num} patches by noise of {noise.shape[1]}, three numbers for each")
    order, kind, other = noise.split(num_patches, dim=1)
    places = torch.argsort(order, dim=1, stable=True)[:, :num]
    corrupted = torch.zeros_like(order, dtype=torch.bool).scatter_(1, places, True)
    own = torch.arange(num_patches, device=noise.device).expand_as(places.new_empty(order.shape))
    another = (own + 1 + torch.floor(other * (num_patches - 1)).to(torch.int64)) % num_patches
    swapped = corrupted & (kind >= MASKED) & (kind < MASKED + SWAPPED)
    return places, corrupted & (kind < MASKED), torch.where(swapped, another, own)

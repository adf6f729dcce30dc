"""Patch embeddings of other sizes and channels: pretrained kernels are carried over so that they answer as they did.

The sizes are FlexiViT's pseudo-inverse resize (Beyer et al. 2023, section 3.4). Shrinking or stretching a kernel like a picture
would change its answers: a kernel of twice the side meets four times the pixels. Surprising: where patches grow, the answer to
a stretched patch is exactly the old one; where they shrink pixels are lost, and it is the closest on average.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitssl.models.positions import Grid


def resize_kernels(kernels: Tensor, size: Grid) -> Tensor:
    """[D, C, h, w] kernels for patches of h x w pixels -> [D, C, H, W] for patches of ``size`` H x W.

    With B the linear map that resizes a patch, the new kernel is the least-squares solution of <B x, new> = <x, old> over all
    patches x, which is pinv(B') old. B is bicubic with antialiasing, as the data engine resizes images (FlexiViT's code takes
    the bilinear one of its own input pipeline; timm takes this one). B works on rows and columns apart, and so does its
    pseudo-inverse. In float64; an equal size returns ``kernels`` itself.
    """
    if tuple(kernels.shape[-2:]) == tuple(size):
        return kernels
    rows, columns = (torch.linalg.pinv(resizing(old, new).T) for old, new in zip(kernels.shape[-2:], size, strict=True))
    return (rows.to(kernels.device) @ kernels.double() @ columns.T.to(kernels.device)).to(kernels.dtype)


def resizing(old: int, new: int) -> Tensor:
    """[new, old] float64: the matrix that resizes a line of ``old`` pixels to ``new``, bicubic with antialiasing."""
    lines = torch.eye(old, dtype=torch.float64)[None, None]  # one a row; torch 2.15 errs on images that are one pixel wide
    return F.interpolate(lines, size=(old, new), mode="bicubic", align_corners=False, antialias=True)[0, 0].T


def inflate_kernels(kernels: Tensor, channels: int) -> Tensor:
    """[D, C, h, w] kernels -> [D, ``channels``, h, w] with the same answer to an image whose channels are all alike.

    More channels: the old ones are repeated in turn, each divided by how often it comes (for a multiple of C this is timm's
    factor C / channels; for others timm's would change the answer). Fewer: the old ones are added up in turn. An equal number
    returns ``kernels`` itself.
    """
    own = kernels.shape[1]
    if own == channels:
        return kernels
    share = torch.zeros(channels, own, dtype=torch.float64, device=kernels.device)
    for number in range(max(own, channels)):
        share[number % channels, number % own] = 1
    return torch.einsum("nc,dchw->dnhw", share / share.sum(dim=0), kernels.double()).to(kernels.dtype)

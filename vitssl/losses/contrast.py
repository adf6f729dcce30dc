"""Contrast: a row's own partner among the rows of everybody else. B rows of this process, A rows of all, D numbers in a row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitssl.losses.precision import full_precision


@full_precision
def info_nce(queries: Tensor, keys: Tensor, own: Tensor, *, temperature: float, scaled: bool = True) -> Tensor:
    """Scalar, in nats: cross entropy of each query with its own key among all keys, mean over queries.

    queries [B, D], keys [A, D] (no gradient reaches them), own [B] int64: which key belongs to a query. All are normalised
    here. With ``scaled`` times 2 x temperature, which keeps gradients of one size (MoCo v3, Chen et al. 2021, algorithm 1).
    """
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys.detach(), dim=-1).T / temperature  # [B, A]
    loss = F.cross_entropy(logits, own)
    return 2 * temperature * loss if scaled else loss


@full_precision
def nt_xent(first: Tensor, second: Tensor, all_first: Tensor, all_second: Tensor, own: Tensor, *, temperature: float) -> Tensor:
    """Scalar, in nats: each row's other view among all rows of both views but itself; mean over the 2B rows.

    first, second [B, D]: two views of this process's samples; all_first, all_second [A, D]: of everybody's; own [B] int64:
    where the former stand among the latter. Normalised here. SimCLR (Chen et al. 2020, equation 1).
    """
    anchors = F.normalize(torch.cat([first, second]), dim=-1)  # [2B, D]
    others = F.normalize(torch.cat([all_first, all_second]), dim=-1)  # [2A, D]
    num = len(all_first)
    itself = torch.cat([own, own + num])
    logits = (anchors @ others.T / temperature).scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, torch.cat([own + num, own]))

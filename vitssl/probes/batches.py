"""The order in which a probe that trains is shown its samples."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vitssl import draws
from vitssl.views import purpose

_ORDER = purpose("order of a probe")


class Shuffled:
    """Rows [B] of ``num`` samples for ``epochs``, a new permutation each epoch, a function of ``seed``; ``len`` counts batches.

    The rest of an epoch that fills no batch is dropped, as the published protocols do; a set smaller than a batch is one batch.
    """

    def __init__(self, num: int, *, epochs: float, batch_size: int, seed: int, device: torch.device) -> None:
        self.num, self.seed, self.device = num, seed, device
        self.batch_size = min(batch_size, num)
        self.per_epoch = num // self.batch_size
        self.total = max(1, round(epochs * self.per_epoch))

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.total):
            epoch, place = divmod(step, self.per_epoch)
            if place == 0:
                order = draws.permutation(self.seed, draws.fold(_ORDER, epoch), self.num).to(self.device)
            yield order[place * self.batch_size : (place + 1) * self.batch_size]

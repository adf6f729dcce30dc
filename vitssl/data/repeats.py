"""Repeated sampling: each image stands at several positions of the run, so that one decode serves several augmented views.

Repeated augmentation (Hoffer et al. 2020): with all views in one batch its gradient has less variance; a stride apart they
meet in different batches, and only the decoding is saved. An epoch still counts positions: with r repeats it shows 1/r of the
images, r times each.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitssl.data.mixing import MixedOrder
from vitssl.data.order import Order
from vitssl.data.sources.balanced import BalancedOrder


class RepeatedOrder:
    """``order`` with each sample at ``repeats`` positions, ``stride`` apart: blocks of ``stride`` positions, each r times."""

    shuffle = True

    def __init__(self, order: Order | MixedOrder | BalancedOrder, *, repeats: int, stride: int) -> None:
        self.order, self.repeats, self.stride = order, repeats, stride
        self.num_samples, self.lanes, self.reach = order.num_samples, order.lanes, order.reach * repeats

    def locate(self, positions: ArrayLike) -> NDArray[np.int64]:
        """[n] int64 positions of the run (>= 0) -> [n] int64 sample ids."""
        blocks, places = np.divmod(np.asarray(positions, dtype=np.int64), self.repeats * self.stride)
        return self.order.locate(blocks * self.stride + places % self.stride)

    def later(self, position: int) -> range:
        """The positions after this one at which its sample stands again."""
        end = (position // (self.repeats * self.stride) + 1) * self.repeats * self.stride
        return range(position + self.stride, end, self.stride)

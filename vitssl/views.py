"""A view: what an objective wants to see of an image. A frozen value, so equal wishes are served by one tensor."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class View:
    """One geometric view of an image, delivered as uint8 [C, height, width].

    ``scale`` and ``ratio`` are the area fraction and the aspect-ratio range of a random resized crop (Szegedy et al. 2015);
    ``scale=None`` asks for the deterministic view: the short side resized to ``resize`` (default: the size itself), then a
    centre crop. ``flip`` is the probability of a horizontal flip. ``copy`` tells apart views that differ only in
    their draws (the two crops of a contrastive pair).
    """

    size: tuple[int, int]  # height, width
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    interpolation: str = "bicubic"
    resize: int | None = None
    copy: int = 0

    @property
    def purpose(self) -> int:
        """The stable 63-bit hash under which this view draws its random numbers: adding another view changes none of them."""
        return purpose(repr(self))


def purpose(name: str) -> int:
    """A stable 63-bit hash of a name, the ``purpose`` of :func:`vitssl.draws.uniform`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1

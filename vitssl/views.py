"""A view: what an objective wants to see of an image. A frozen value, so equal wishes are served by one tensor."""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class Photometric:
    """How a view's colours are changed, on the device: probabilities of ``jitter``, ``grey``, ``blur`` and ``solarize``.

    Strengths as in torchvision's ``ColorJitter``: factors of brightness, contrast and saturation in 1 -+ strength, a hue
    turned by up to ``hue`` of a circle. ``sigma`` of the Gaussian blur in pixels, uniform between two values.
    """

    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    @property
    def changes(self) -> bool:
        """Whether it ever does anything."""
        return max(self.jitter, self.grey, self.blur, self.solarize) > 0


@dataclass(frozen=True, order=True)
class View:
    """One view of an image: its geometry, delivered as uint8 [C, height, width], and what is done to its colours on the device.

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
    photometric: Photometric = field(default=Photometric(), repr=False)

    @property
    def purpose(self) -> int:
        """The stable 63-bit hash under which this view draws its random numbers: adding another view changes none of them.

        It is one of its geometry: two views that differ in colours alone show the same crop, unless ``copy`` differs.
        """
        return purpose(repr(self))


def purpose(name: str) -> int:
    """A stable 63-bit hash of a name, the ``purpose`` of :func:`vitssl.draws.uniform`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1

"""What others need to know of an encoder to fit their own modules, masks and views to it, and what it refuses them."""

from dataclasses import dataclass
from typing import Literal

from vitssl.errors import ConfigError
from vitssl.models.positions import Grid, check_size

Pooling = Literal["mean", "class"]


@dataclass(frozen=True)
class EncoderSpec:
    """Its shape, and what it can and cannot do."""

    dim: int
    depth: int
    heads: int
    patch: Grid  # pixels: height, width
    grid: Grid  # patches: rows, columns
    prefix: int  # class token and registers
    channels: int = 3
    class_token: bool = True  # whether the first prefix token is one
    drops: bool = True  # whether patches can be left out (``keep``)
    any_size: bool = True  # whether images of other sizes are served
    overlaps: bool = False  # whether the stem mixes the pixels of neighbouring patches

    def refuse_masks(self, what: str) -> None:
        """Raise ConfigError, beginning with ``what``, for an encoder in which masked patches show through."""
        if self.overlaps:
            raise ConfigError(
                f"{what} masks patches, and this encoder's stem has mixed the pixels of neighbouring ones before: its receptive"
                " field leaks what is masked; take plain patches, or objectives that do not mask"
            )

    def refuse_drops(self, what: str) -> None:
        """Raise ConfigError, beginning with ``what``, for an encoder whose patches cannot be left out."""
        if not self.drops:
            raise ConfigError(
                f"{what} leaves patches out, and a Beit's relative positions are laid out for all of them; take a"
                " VisionTransformer or Eva as encoder.name"
            )

    def refuse_pooling(self, pooling: Pooling, key: str = "pooling") -> None:
        """Raise ConfigError for the class token of an encoder that has none; ``key`` is who asked for it."""
        if pooling == "class" and not self.class_token:
            raise ConfigError(f"{key}=class needs a class token and this encoder has none; use {key}=mean")

    def require_class_token(self, what: str) -> None:
        """Raise ConfigError, beginning with ``what``, for an encoder without a class token."""
        if not self.class_token:
            raise ConfigError(f"{what} is about the class token, and this encoder has none; set encoder.class_token=true")

    def refuse_size(self, size: Grid, what: str) -> None:
        """Raise ConfigError, beginning with ``what``, for images of a size that this encoder does not serve."""
        check_size(size, self.patch, f"{what} images of")
        if not self.any_size and size != self.image_size:
            own = f"{self.image_size[0]}x{self.image_size[1]}"
            raise ConfigError(
                f"{what} images of {size[0]}x{size[1]}, and this Beit's relative positions are laid out for {own} alone; take a"
                " VisionTransformer or Eva as encoder.name"
            )

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def image_size(self) -> Grid:
        """Height, width in pixels."""
        return self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]

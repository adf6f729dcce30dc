"""timm's ``Beit``: ViTs whose attention adds a learned number for every pair of places (relative position bias).

The tables are laid out for all patches of one grid, so patches can be replaced but not dropped, and an image of another size
needs a network built for it, whose tables :meth:`TimmBeit.fitted` carries over by timm's own interpolation.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Beit
from torch import Tensor, nn

from vitssl.errors import CheckpointError, ConfigError
from vitssl.models.adapters.timm_vit import TimmViT
from vitssl.models.positions import Grid, ResampleRule
from vitssl.models.state import by

_TABLE = "relative_position_bias_table"
_EXTRA = 3  # rows of a table beside those of patches: class token to patch, patch to class token, class token to itself


class TimmBeit(TimmViT):
    """The parts of a timm ``Beit``: relative positions in each block, or one table that all share."""

    model: ClassVar[type[nn.Module]] = Beit
    names: ClassVar[Mapping[str, str]] = {
        **{key: TimmViT.names[key] for key in ("image_size", "patch_size", "channels", "drop_path")},
        "fc_norm": "use_fc_norm",
    }
    drops: ClassVar[bool] = False
    always: ClassVar[Mapping[str, Any]] = {"registers": 0, "class_token": True}

    def __init__(self, model: Beit, *, pos_resample: ResampleRule) -> None:
        super().__init__(model, pos_resample=pos_resample)
        self.pos_drop = model.pos_drop
        self.rel_pos_bias = model.rel_pos_bias

    @property
    def any_size(self) -> bool:
        return not any(name.endswith(_TABLE) for name, _ in self.named_parameters())

    @property
    def any_size_in_a_graph(self) -> bool:
        return False

    def norm_arguments(self, *, after_pooling: bool) -> dict[str, Any]:
        return {"use_fc_norm": after_pooling}  # timm's Beit always has one of the two norms

    def fitted(self, state: Mapping[str, Tensor], grid: Grid | None) -> dict[str, Tensor]:
        own = self.state_dict()
        tables = {name: table for name, table in state.items() if name.endswith(_TABLE) and name in own}
        return super().fitted(state, grid) | {
            name: resize_rel_pos_bias_table(
                table, self.grid, tuple(own[name].shape), old_window_size=_window(name, table, grid)
            )
            for name, table in tables.items()
        }

    def _beside(self, grid: Grid, keep: Tensor | None) -> Sequence[Mapping[str, Tensor]] | None:
        if keep is not None:
            raise ConfigError(
                "patches cannot be dropped from a Beit, whose relative positions are laid out for all of them; take an"
                " objective that replaces patches by a mask token, or a VisionTransformer or Eva as encoder.name"
            )
        if grid != self.grid and not self.any_size:
            own, given = (tuple(side * patch for side, patch in zip(each, self.patch)) for each in (self.grid, grid))
            raise ConfigError(
                f"an image of {given[0]}x{given[1]}, but this Beit's relative positions are for {own[0]}x{own[1]} alone; "
                f"set encoder.image_size (weights are then carried over)"
            )
        return None if self.rel_pos_bias is None else [{"shared_rel_pos_bias": self.rel_pos_bias()}] * len(self.blocks)


def _window(name: str, table: Tensor, grid: Grid | None) -> Grid:
    """The grid a table was made for. Raises CheckpointError where it was not made for ``grid``, or for no square."""
    num = len(table) - _EXTRA
    window = grid or ((round(max(num, 0) ** 0.5) + 1) // 2,) * 2
    if (2 * window[0] - 1) * (2 * window[1] - 1) != num:
        raise CheckpointError(
            f"{name} {by(table)} holds {num} relative positions, which are not those of a {window[0]}x{window[1]} grid; "
            "say which grid the weights were made for"
        )
    return window

"""One encoder takes over another's weights, though images, patches, channels or prefix tokens may differ.

What the two must share is the network between stem and end: width, depth, heads, blocks. The rest is carried over so that the
new encoder begins as close to the old one as it can. Positions of prefix tokens that the new encoder has no place for are added
to the tokens themselves, which is the same network.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vitssl.errors import CheckpointError
from vitssl.models.encoder import Encoder
from vitssl.models.patches import inflate_kernels, resize_kernels
from vitssl.models.positions import Grid, resample
from vitssl.models.state import require_fit

_KERNELS = "patch_embed.proj.weight"
_CARRIED = ("cls_token", "reg_token", "pos_embed", _KERNELS)
_PASSING = ("DropPath", "Dropout", "Identity")  # how an encoder trains, not what it is


def require_like(encoder: Encoder, other: Encoder, *, advice: str) -> None:
    """Nothing, if :func:`adopt` can carry the weights of ``other`` into ``encoder``; either may be an outline.

    Raises CheckpointError with what differs, and ``advice``.
    """
    ours, theirs = _words(encoder), _words(other)
    rows = [f"{title} {theirs[title]} instead of {ours[title]}" for title in ours if theirs[title] != ours[title]]
    if rows:
        raise CheckpointError(f"these weights do not fit {encoder.architecture}: {', '.join(rows)}; {advice}")
    try:
        require_fit(_between(_fitted(encoder, other)), _between(encoder.state()), model=encoder.architecture)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {advice}") from None
    surplus = [slot for slot in _slots(other) if slot not in _slots(encoder)]
    if surplus:
        raise CheckpointError(
            f"these weights have a {surplus[0]} and the encoder has none ({len(surplus)} such tokens); the rest has learned to"
            f" use it; {advice}"
        )


def adopt(encoder: Encoder, other: Encoder) -> list[str]:
    """Give ``encoder`` the weights of ``other``; returns a few words for each thing that could not stay as it is.

    Positions are resampled by the encoder's own rule, fixed ones are the new grid's table; patches are resized by FlexiViT's
    method, channels inflated (:mod:`vitssl.models.patches`); prefix tokens that ``other`` has not begin fresh. Both must fit
    (:func:`require_like`). Raises CheckpointError where positions that were learned would become fixed ones.
    """
    state, own, notes = _fitted(encoder, other) | _stem(other), encoder.state(), []
    spec = encoder.spec
    if spec.patch != other.spec.patch:
        state[_KERNELS] = resize_kernels(state[_KERNELS], spec.patch)
        notes.append(f"patches of {_by(other.spec.patch)} pixels -> {_by(spec.patch)} (FlexiViT)")
    if spec.channels != other.spec.channels:
        state[_KERNELS] = inflate_kernels(state[_KERNELS], spec.channels)
        notes.append(f"{other.spec.channels} channels -> {spec.channels}")
    tokens, places = _prefix(encoder, other)
    grids = f"{_by(other.spec.grid)} -> {_by(spec.grid)}"
    if "pos_embed" in state and "pos_embed" in own:
        state["pos_embed"] = torch.cat([places, _positions(encoder, other)], dim=1)
        rule = "the fixed table" if encoder.fixed else f"{encoder.pos_resample}'s rule"
        notes += [f"positions {grids} ({rule})"] if spec.grid != other.spec.grid else []
    if any(own[name].shape != tensor.shape for name, tensor in _between(other.state()).items()):
        notes.append(f"relative positions {grids} (timm's rule)")
    state |= {"cls_token": tokens[:, :1]} if spec.class_token else {}
    state |= {"reg_token": tokens[:, spec.class_token :]} if "reg_token" in own else {}
    fresh = [slot for slot in _slots(encoder) if slot not in _slots(other)]
    notes += [f"fresh: {', '.join(fresh)}"] if fresh else []
    encoder.load_state({name: tensor for name, tensor in state.items() if name in own or name not in _CARRIED})
    return notes


def _words(encoder: Encoder) -> dict[str, object]:
    """What two networks must share, also where shapes do not tell it."""
    block, spec, stem = encoder.vit.blocks[0], encoder.spec, type(encoder.vit.patch_embed).__name__
    kinds = sorted({type(part).__name__ for part in block.modules()} - {*_PASSING, type(block).__name__})
    return {
        "width": spec.dim,
        "stem": f"{stem} of {_by(spec.patch)} pixels and {spec.channels} channels" if spec.overlaps else stem,
        "depth": spec.depth,
        "heads": spec.heads,
        "blocks": f"{type(block).__name__} of {', '.join(kinds)}",
        "rotations": encoder.vit.rotations,
        "epsilon": max((part.eps for part in block.modules() if hasattr(part, "eps")), default=None),
    }


def _fitted(encoder: Encoder, other: Encoder) -> dict[str, Tensor]:
    """The state of ``other`` without its stem, with what its blocks know of places (Beit's tables) for the encoder's grid."""
    return encoder.vit.fitted(_between(other.state()), other.spec.grid)


def _stem(encoder: Encoder) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in encoder.state().items() if name in _CARRIED}


def _between(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in _CARRIED}


def _slots(encoder: Encoder) -> list[str]:
    """The prefix tokens by name, in their order."""
    first = int(encoder.spec.class_token)
    return ["class token"] * first + [f"register {number}" for number in range(1, encoder.spec.prefix - first + 1)]


def _prefix(encoder: Encoder, other: Encoder) -> tuple[Tensor, Tensor]:
    """The prefix tokens [1, R, D] and their positions [1, R or 0, D] as they are to be."""
    (tokens, places), (theirs, beside) = _tokens(encoder), _tokens(other)
    placed = encoder.vit.pos_prefix > 0 and not encoder.fixed  # else positions are added to the tokens
    for number, slot in enumerate(_slots(encoder)):
        if slot in _slots(other):
            old = _slots(other).index(slot)
            tokens[:, number] = theirs[:, old] + (0 if placed else beside[:, old])
            places[:, number] = beside[:, old] if placed else 0
    return tokens, places[:, : encoder.vit.pos_prefix]


def _tokens(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Copies of the prefix tokens [1, R, D] and of their positions, zeros where there are none."""
    state, spec = encoder.state(), encoder.spec
    parts = [state[name] for name in ("cls_token", "reg_token") if name in state]
    tokens = torch.cat(parts, dim=1).clone() if parts else torch.zeros(1, 0, spec.dim)
    places = torch.zeros_like(tokens)
    if "pos_embed" in state and encoder.vit.pos_prefix:
        places = state["pos_embed"][:, : encoder.vit.pos_prefix].clone()
    return tokens, places


def _positions(encoder: Encoder, other: Encoder) -> Tensor:
    """[1, N, D]: the patches' positions on the encoder's own grid."""
    table, grid = other.state()["pos_embed"][:, other.vit.pos_prefix :], other.spec.grid
    if not encoder.fixed:
        return resample(table, grid, encoder.spec.grid, encoder.pos_resample)
    fixed = encoder.table(grid)[None].to(table)
    if (table - fixed).abs().max() > 1e-3:  # half-precision files have the table to 5e-4
        raise CheckpointError(
            f"the positions of these weights are not the fixed table of encoder.positions={encoder.positions}; take"
            f" encoder.positions=learned, which begins with them ({_by(grid)})"
        )
    return encoder.state()["pos_embed"][:, encoder.vit.pos_prefix :]


def _by(size: Grid) -> str:
    return f"{size[0]}x{size[1]}"

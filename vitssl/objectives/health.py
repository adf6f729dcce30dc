"""Whether the networks of a run are well: what only those who hold them can measure, without a training step.

Attention that no longer chooses (its entropy near 1) or looks at one token alone (near 0) goes before instability (Zhai et al.
2023); the gradient that each objective sends into the encoder's tokens says who rules a mixture.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitssl.models.encoder import Encoder
from vitssl.models.twin import Twin

ATTENDED = 16  # of a batch's images: theirs is the attention that is computed again
Outputs = tuple[Tensor | list[Tensor], list[Tensor]]


@contextmanager
def tokens_of(encoder: Encoder) -> Iterator[list[Tensor]]:
    """The tokens that an encoder hands out inside. It keeps nothing for a backward pass: gradients end at its tokens."""
    found: list[Tensor] = []

    def leaf(tokens: Tensor) -> Tensor:
        found.append(tokens.detach().requires_grad_())
        return found[-1]

    def begin(module: nn.Module, given: tuple) -> None:
        torch.set_grad_enabled(False)

    def keep(module: nn.Module, given: tuple, out: Outputs) -> Outputs:
        torch.set_grad_enabled(True)
        tokens, blocks = out  # after the norm, of one size or of several, and before it
        return leaf(tokens) if isinstance(tokens, Tensor) else [*map(leaf, tokens)], [*map(leaf, blocks)]

    hooks = encoder.vit.register_forward_pre_hook(begin), encoder.vit.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def gradient_norm(loss: Tensor, tokens: list[Tensor]) -> Tensor:
    """Scalar: the norm of a loss's gradient with respect to the encoder's output tokens; 0 where it does not look at them."""
    gradients = torch.autograd.grad(loss, tokens, allow_unused=True) if tokens and loss.requires_grad else []
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(())


@torch.no_grad()
def attention_entropy(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """Of the first and the last block, mean over heads and queries, as a share of that of even attention."""
    blocks = sorted({0, encoder.spec.depth - 1})
    found = {}
    for number, attention in zip(blocks, encoder.attention(images, blocks), strict=True):
        attention = attention.float()  # [B, heads, T, T]
        even = torch.log(torch.tensor(float(attention.shape[-1]), device=attention.device))
        found[f"attention_entropy_{number}"] = -torch.xlogy(attention, attention).sum(dim=-1).mean() / even
    return found


@torch.no_grad()
def beside_teacher(encoder: Encoder, teacher: Twin | None, images: Tensor) -> dict[str, Tensor]:
    """How alike student and teacher answer (mean cosine of their tokens), and how far their weights lie apart (relative)."""
    if teacher is None:
        return {}
    own, other = (network(images).patches.float() for network in (encoder, teacher))
    pairs = list(zip(encoder.parameters(), teacher.average.parameters(), strict=True))
    apart = torch.stack([(p.float() - q.float()).norm() for p, q in pairs]).norm()  # one at a time: encoders are large
    return {
        "teacher_agreement": torch.cosine_similarity(own, other, dim=-1).mean(),
        "teacher_distance": apart / torch.stack([q.float().norm() for _, q in pairs]).norm(),
    }

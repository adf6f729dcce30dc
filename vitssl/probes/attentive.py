"""The attentive probe: one learned query looks over an encoder's patch tokens, and a linear layer reads what it saw.

As CAE and I-JEPA judge encoders whose class token or mean says little (Chen et al. 2022, sec. 4.1). Tokens are standardised
by a BatchNorm without parameters first (as in AIM), so one learning rate serves encoders of any scale.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitssl.probes.batches import Shuffled
from vitssl.schedule import Schedule


class AttentiveHead(nn.Module):
    """tokens [B, N, D] -> logits [B, C]; ``heads`` must divide D (ValueError)."""

    def __init__(self, width: int, num_classes: int, *, heads: int = 12) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads = heads
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.zeros(width))
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, C]."""
        batch, num, width = tokens.shape
        tokens = self.norm(tokens.flatten(0, 1)).view(batch, num, width)
        keys, values = (each(tokens).view(batch, num, self.heads, -1).transpose(1, 2) for each in (self.key, self.value))
        query = self.query.view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        seen = F.scaled_dot_product_attention(query, keys, values)  # [B, heads, 1, D / heads]
        return self.linear(seen.flatten(1))


def train_attentive(
    tokens: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    lr: float,
    epochs: float = 20,
    batch_size: int = 256,
    weight_decay: float = 0.0,
    heads: int | None = None,
    seed: int = 0,
) -> AttentiveHead:
    """A head trained on tokens [N, P, D] with ``labels`` [N] by AdamW, a cosine from ``lr`` after a twentieth of warm-up.

    It lies where the labels do; the tokens may stay on the host. ``heads`` defaults to D / 64; batches are :class:`Shuffled`.
    """
    device, width = labels.device, tokens.shape[2]
    batches = Shuffled(len(tokens), epochs=epochs, batch_size=batch_size, seed=seed, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        head = AttentiveHead(width, num_classes, heads=heads or max(1, width // 64)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = Schedule(peak=lr, warmup=len(batches) // 20, total=len(batches))
    for step, rows in enumerate(batches, start=1):  # a zero head with no rate would learn nothing in its first step
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.zero_grad()
        F.cross_entropy(head(tokens[rows.to(tokens.device)].to(device).float()), labels[rows]).backward()
        optimizer.step()
    return head.eval()


@torch.no_grad()
def attentive_accuracy(head: AttentiveHead, tokens: Tensor, labels: Tensor, *, chunk: int = 256) -> float:
    """Top-1 accuracy in [0, 1] on tokens [N, P, D], ``chunk`` samples at a time."""
    parts = zip(tokens.split(chunk), labels.split(chunk), strict=True)
    right = sum((head(some.to(labels.device).float()).argmax(dim=1) == answers).sum() for some, answers in parts)
    return (right / max(1, len(labels))).item()

"""The attentive probe against torch's own attention, and on tokens of which one in many says it."""

import pytest
import torch
from torch import nn

from vitssl.probes.attentive import AttentiveHead, attentive_accuracy, train_attentive


def test_it_is_torchs_attention() -> None:
    torch.manual_seed(0)
    head, tokens = AttentiveHead(12, 5, heads=3).double(), torch.randn(4, 7, 12, dtype=torch.float64)
    nn.init.normal_(head.linear.weight)
    oracle = nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double()
    oracle.in_proj_weight.data[:12] = torch.eye(12)
    oracle.in_proj_weight.data[12:24], oracle.in_proj_weight.data[24:] = head.key.weight.data, head.value.weight.data
    oracle.out_proj.weight.data[:] = torch.eye(12)
    rows = tokens.flatten(0, 1)
    white = ((rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-6).sqrt()).view_as(tokens)
    seen, _ = oracle(head.query.expand(4, 1, -1), white, white)
    torch.testing.assert_close(head(tokens), head.linear(seen[:, 0]), rtol=1e-10, atol=1e-12)


def needles(num: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten tokens of noise each; one, marked by its first channel, has the class in the others. The mean tells little."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num,), generator=draw)
    tokens = torch.randn(num, 10, 16, generator=draw)
    tokens[:, :, 0] = 0
    place = torch.randint(10, (num,), generator=draw)
    mark = torch.zeros(16)
    mark[0] = 6
    tokens[torch.arange(num), place] = mark + 2.5 * torch.eye(16)[1 + labels]
    return tokens, labels


def test_it_finds_the_one_token_that_tells() -> None:
    train, test = needles(1500, seed=0), needles(500, seed=1)
    head = train_attentive(*train, num_classes=4, lr=5e-3, epochs=15, batch_size=100, heads=2)
    assert attentive_accuracy(head, *test) > 0.95
    again = train_attentive(*train, num_classes=4, lr=5e-3, epochs=15, batch_size=100, heads=2)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def test_the_first_loss_is_ln_c_and_odd_heads_are_refused() -> None:
    assert AttentiveHead(8, 3, heads=2)(torch.randn(5, 4, 8)).abs().max() == 0
    with pytest.raises(ValueError, match="5 heads do not divide a width of 12"):
        AttentiveHead(12, 3, heads=5)

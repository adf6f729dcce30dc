"""BatchNorm over processes: torch's own on one, and on two that of the joined batch with its gradient."""

import pytest
import torch
from torch import Tensor, nn

from vitssl import dist
from vitssl.errors import ConfigError
from vitssl.models.norms import BatchNorm


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(2))


def seen(norm: nn.Module, own: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    own = own.clone().requires_grad_()
    out = norm(own)
    (out * wanted).sum().backward()
    return {"out": out.detach(), "gradient": own.grad, "mean": norm.running_mean, "variance": norm.running_var}


def of_process() -> dict[str, Tensor]:
    return seen(BatchNorm(5).double(), *(each[dist.rank() :: dist.world()] for each in rows()))


def test_on_one_process_it_is_torchs():
    expected = seen(nn.BatchNorm1d(5).double(), *rows())
    for name, found in of_process().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=1e-12)


def test_two_processes_have_the_statistics_and_gradients_of_the_joined_batch(gang):
    """What both make of it is summed, so the gradient of each is that of the sum of both losses."""
    expected = seen(nn.BatchNorm1d(5).double(), *rows())
    for rank, found in enumerate(gang(2)(of_process)):
        for name, value in found.items():
            whole = expected[name][rank::2] if name in ("out", "gradient") else expected[name]
            torch.testing.assert_close(torch.as_tensor(value), whole, rtol=1e-12, atol=1e-12)


def test_one_row_has_no_statistics():
    with pytest.raises(ConfigError, match="batch_size: one row alone has no statistics, and BatchNorm needs two"):
        BatchNorm(3)(torch.zeros(1, 3))
    assert BatchNorm(3).eval()(torch.zeros(1, 3)).shape == (1, 3)

"""BatchNorm whose statistics are those of the whole batch, whoever holds its rows (Ioffe and Szegedy 2015).

torch's SyncBatchNorm refuses tensors on a CPU. This one is written with differentiable sums over processes, so it works on
every device, and a test can prove that N processes have the gradient of one.
"""

import torch
from torch import Tensor, nn

from vitssl import dist
from vitssl.errors import ConfigError


class BatchNorm(nn.BatchNorm1d):
    """[B_p, D] -> [B_p, D], as ``nn.BatchNorm1d`` of the joined batch; state and arguments are torch's own.

    Statistics are taken in fp32 at least. In evaluation the running ones serve, and no process waits for another. Raises
    ConfigError where fewer than two rows meet in training.
    """

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training:
            return super().forward(rows)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        count = len(rows) * dist.world()
        if count < 2:
            raise ConfigError("batch_size: one row alone has no statistics, and BatchNorm needs two; take a larger batch")
        mean = dist.total(wide.sum(dim=0)) / count
        centred = wide - mean
        variance = dist.total(centred.square().sum(dim=0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        out = centred * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            out = out * self.weight
        if self.bias is not None:
            out = out + self.bias
        return out.to(rows.dtype)

"""Batch norm over the batch of a step, however many processes it is spread over."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.methods.parts import processes

EPS = 1e-5


class BatchNorm(nn.Module):
    """Batch norm with the statistics of all rows of all processes: [N, C] -> [N, C], with at least two rows.

    torch's SyncBatchNorm does the same on GPUs alone. There are no running statistics, which a step that is left out
    for a number that is not finite would spoil: evaluations normalise by their own batch. So it is for heads that are
    thrown away after the training.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, rows: Tensor) -> Tensor:
        if processes.count() == 1:
            return F.batch_norm(rows, None, None, self.weight, self.bias, training=True, eps=EPS)
        lifted = rows.to(torch.promote_types(rows.dtype, torch.float32))
        centred = lifted - processes.mean(lifted.mean(0))
        variance = processes.mean(centred.square().mean(0))
        return (centred * (variance + EPS).rsqrt() * self.weight + self.bias).to(rows.dtype)

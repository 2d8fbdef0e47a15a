"""Sinkhorn-Knopp: assignments of a batch to prototypes in which every prototype is used alike."""

from __future__ import annotations

import torch
from torch import Tensor

from gtsa.core import processes


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments of rows to prototypes, as targets (SwAV, arXiv 2006.09882, section 3.1; DINOv2, arXiv 2304.07193).

        Q = exp(scores / temperature)
        repeat: Q = Q / column sums;  Q = Q / row sums      # of all rows of all processes

    No prototype can win for all rows, which prevents collapse; it takes the place of centring. The sums are those of
    logarithms, so that no temperature overflows and no prototype divides by 0.

    Args:
        scores: [N, K] similarities of rows and prototypes. With several processes these are the rows of one of them;
            N may differ between them, and may be 0. All of them have to call it, but within ``core.processes.alone``.
        temperature: above 0; DINOv2 has the teacher's, 0.04 to 0.07, SwAV 0.05.
        iterations: at least 1; 3 in both papers.

    Returns:
        [N, K] in float32 at least, without gradient. Every row sums to 1; the columns sum to nearly the same number,
        the more so the more iterations. The rows of a batch depend on one another: accumulated micro-batches are not
        one batch.
    """
    assert iterations >= 1 and temperature > 0
    half = scores.dtype in (torch.bfloat16, torch.float16)
    log_q = (scores.float() if half else scores) / temperature
    for _ in range(iterations):
        log_q -= _log_sums_of_columns(log_q)
        log_q -= log_q.logsumexp(1, keepdim=True)
    return log_q.exp_()


def _log_sums_of_columns(log_q: Tensor) -> Tensor:
    """log sum_n exp(log_q[n, k]) over the rows of all processes: [N, K] -> [K]."""
    if not processes.together():
        return log_q.logsumexp(0) if len(log_q) else log_q.new_zeros(log_q.shape[1])
    lowest = torch.finfo(log_q.dtype).min
    largest = log_q.max(0).values if len(log_q) else log_q.new_full(log_q.shape[1:], lowest)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    sums = (log_q - largest).exp_().sum(0)
    torch.distributed.all_reduce(sums)
    return largest + sums.log_()

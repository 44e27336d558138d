"""A statistical guarantee: each KV head whose selection may lose too much attention mass reads everything.

For one query row and head, let S be the sum of exp(logit) over the tokens that were read, and L the sum over the
unread ones. The lost mass is L / (S + L). S comes with the attention over the selection. L is estimated from exact
logits of a sample of the unread tokens (`kernels/guarantee/`). By the central limit theorem, with probability
1 - delta for many draws,

    L <= mean + z sqrt(variance / draws)        z = the normal quantile of 1 - delta

If this bound on the lost mass is above epsilon for any query row of a KV head, the head attends once more, to all
tokens.
So the statement is for each row and head: the lost mass is at most epsilon, with probability 1 - delta. It follows
vAttention (arXiv 2510.05688), which samples the unread tokens uniformly. Here the sketch's scores say where to sample,
which makes the variance, and so the sample, much smaller.

All of it runs in the step, in CUDA graphs too: the host neither waits nor decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch

from specattn_vllm.kernels.guarantee.contracts import weight_table
from specattn_vllm.methods.sketch import SketchOptions


@dataclass(frozen=True)
class Promise:
    """What is promised of each query row and head, and how many unread tokens are drawn to check it."""

    epsilon: float
    delta: float
    draws: int

    @property
    def quantile(self) -> float:
        return NormalDist().inv_cdf(1 - self.delta)


def promise_of(options: SketchOptions) -> Promise | None:
    """What is promised with these options; None: nothing is checked."""
    return None if options.epsilon is None else Promise(options.epsilon, options.delta, options.draws)


class Guarantee:
    """The buffers of a guarantee. One set for all layers, but for `fallen`.

    positions, worth  [R, H, draws]  the sample of the current layer
    lost              [R, H] float32  the largest upper bound of a head's query rows
    again             [R, H] int32    entries that fallen heads read, 0 for others
    fallen            [layers, R, H] int32  1 for heads that read everything because of the guarantee
    """

    def __init__(self, promise: Promise, layers: int, requests: int, heads: int, device: torch.device) -> None:
        self.promise = promise
        weight_table(device)  # made here, because a CUDA graph cannot be captured while something comes from the host
        new = {"device": device}
        self.positions = torch.full((requests, heads, promise.draws), -1, dtype=torch.int32, **new)
        self.worth = torch.zeros((requests, heads, promise.draws), dtype=torch.float32, **new)
        self.lost = torch.zeros((requests, heads), dtype=torch.float32, **new)
        self.again = torch.zeros((requests, heads), dtype=torch.int32, **new)
        self.fallen = torch.zeros((layers, requests, heads), dtype=torch.int32, **new)

    @property
    def nbytes(self) -> int:
        buffers = (self.positions, self.worth, self.lost, self.again, self.fallen)
        return sum(buffer.nbytes for buffer in buffers)

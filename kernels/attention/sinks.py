"""Attention sinks: one more logit of each head in the denominator of the softmax, which has no value (gpt-oss)."""

from __future__ import annotations

import torch


def weigh_against_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Give attention without sinks the weights that it has with them, in place.

    out [T, Hq, D], any float; lse [T, Hq] float32, the natural logarithm of the softmax's denominator without sinks;
    sinks [Hq], any float. With a sink s the denominator is exp(lse) + exp(s), so all weights shrink by
    exp(lse) / (exp(lse) + exp(s)) = sigmoid(lse - s). Rows that saw nothing (lse = -inf) get 0. Plain PyTorch on every
    device; it never waits for one.
    """
    out.copy_(out * torch.sigmoid(lse - sinks.float())[..., None])

"""Soft caps on logits: l becomes cap * tanh(l / cap), which lies between -cap and cap (Gemma 2, arXiv 2408.00118)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def soft_capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits with a soft cap; None: as they are."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


@triton.jit
def soft_cap_logits(logits, cap):
    """The same in a kernel. Powers that overflow give the cap itself."""
    return cap * (1.0 - 2.0 / (1.0 + tl.exp(logits * (2.0 / cap))))

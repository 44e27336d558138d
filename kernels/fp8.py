"""Keys and values in a cache of 8-bit floats (e4m3), as vLLM writes them with `--kv-cache-dtype fp8`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contracts import FP8

LARGEST: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def round_to(x, scale, cache):
    """x / scale in the dtype of the cache that a pointer is of. Numbers beyond the largest become that; NaN stays."""
    y = tl.math.div_rn(x.to(tl.float32), scale)
    y = tl.where(y == y, tl.minimum(tl.maximum(y, -LARGEST), LARGEST), y)
    return y.to(cache.dtype.element_ty)


def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
    """The same in PyTorch. x: any shape and float dtype."""
    return (x.float() / scale).clamp(-LARGEST.value, LARGEST.value).to(FP8)

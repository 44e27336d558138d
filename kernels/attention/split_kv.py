"""Split-KV: several programs share one row of attention, and a second kernel puts their parts together.

A part is (acc, lse) of a slice of the keys: lse = log sum exp(logit), acc = softmax(logits) @ V over the slice. The
whole is lse = log sum_s exp(lse_s) and out = sum_s exp(lse_s - lse) acc_s. A slice without keys has lse = -inf, and
its acc is never read.
(Flash-Decoding: Dao, Haziza, Massa, Sizov, 2023.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

# Programs wanted per multiprocessor. Decode is bound by memory latency at few rows: two resident programs per
# multiprocessor keep loads in flight while one of them waits.
WAVES = 2
# More parts than this cost more in the combine kernel than they bring.
MAX_SPLITS = 64
# Elements of the parts that one program of the combine kernel holds: 32 registers of each of its threads.
COMBINE_ELEMENTS = 4096


@lru_cache
def _processors(device: torch.device) -> int:
    # Without a GPU the kernels run in Triton's interpreter; a few splits there, so that the combine is exercised.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def num_splits(programs: int, longest: int, block: int, device: torch.device, waves: int = WAVES) -> int:
    """How many parts to cut a row of at most ``longest`` keys into, ``programs`` being the grid without splits and
    ``waves`` the programs wanted per multiprocessor.

    Depends on shapes alone, never on lengths: those are on the device, and a captured CUDA graph keeps its grid. A
    power of two, to bound the number of compiled variants.
    """
    wanted = min(waves * _processors(device) // max(programs, 1), -(-longest // block), MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


@triton.jit
def split_range(length, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """[lo, hi) of one split; whole blocks, so that only the last split has a ragged end."""
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    lo = tl.minimum(split * per_split, length)
    return lo, tl.minimum(lo + per_split, length)


@triton.jit
def log_norm(m, norm):
    """Logsumexp from an online softmax's maximum and norm: -inf where nothing was seen."""
    return tl.where(norm > 0.0, m + tl.log(tl.where(norm > 0.0, norm, 1.0)), float("-inf"))


@triton.jit
def combine_splits(acc, lse, stride_acc, stride_lse, SPLITS: tl.constexpr, D: tl.constexpr, HAS_ACC: tl.constexpr):
    """Whole (out [D], lse) from SPLITS parts at ``acc + s * stride_acc`` [D] and ``lse + s * stride_lse``."""
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    part_lse = tl.load(lse + s * stride_lse)
    top = tl.max(part_lse, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(part_lse - safe)
    norm = tl.sum(weight, 0)
    total = log_norm(safe, norm)
    result = tl.zeros([D], tl.float32)
    if HAS_ACC:
        some = part_lse > float("-inf")
        parts = tl.load(acc + s[:, None] * stride_acc + d[None, :], mask=some[:, None], other=0.0)
        result = tl.sum(parts * weight[:, None], 0) / tl.where(norm > 0.0, norm, 1.0)
    return result, total

"""Split-KV: several programs share one row of attention, and a second kernel combines their parts.

A part is (acc, lse) for a slice of the keys: lse = log sum exp(logit), acc = softmax(logits) @ V over the slice. The
result is lse = log sum_s exp(lse_s) and out = sum_s exp(lse_s - lse) acc_s. A slice without keys has lse = -inf, and
its acc is never read.
(Flash-Decoding: Dao, Haziza, Massa, Sizov, 2023.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

# Programs wanted per multiprocessor. With few rows, decoding is limited by memory latency: of two resident programs,
# one has loads in flight while the other waits.
WAVES = 2
# More parts than this cost more in the combine kernel than they save.
MAX_SPLITS = 64
# Elements of the parts that one program of the combine kernel holds: 32 registers of each of its threads.
COMBINE_ELEMENTS = 4096


@lru_cache
def _processors(device: torch.device) -> int:
    # Without a GPU the kernels run in Triton's interpreter. A few splits there also test the combine kernel.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def num_splits(programs: int, longest: int, block: int, device: torch.device, waves: int = WAVES) -> int:
    """The number of parts for a row of at most ``longest`` keys. ``programs``: size of the grid without splits;
    ``waves``: programs wanted per multiprocessor.

    It depends only on shapes, never on lengths, because lengths are on the device and a captured CUDA graph keeps its
    grid. It is a power of two, which limits the number of compiled variants.
    """
    wanted = min(waves * _processors(device) // max(programs, 1), -(-longest // block), MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


@triton.jit
def split_range(length, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """[lo, hi) of one split. Splits are whole blocks, so that only the last split has a ragged end."""
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    lo = tl.minimum(split * per_split, length)
    return lo, tl.minimum(lo + per_split, length)


@triton.jit
def log_norm(m, norm):
    """Logsumexp from the maximum and norm of an online softmax; -inf for rows without keys."""
    return tl.where(norm > 0.0, m + tl.log(tl.where(norm > 0.0, norm, 1.0)), float("-inf"))


@triton.jit
def combine_splits(acc, lse, stride_acc, stride_lse, SPLITS: tl.constexpr, D: tl.constexpr, HAS_ACC: tl.constexpr):
    """Combine SPLITS parts at ``acc + s * stride_acc`` [D] and ``lse + s * stride_lse``. Returns (out [D], lse)."""
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

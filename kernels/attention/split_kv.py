"""Split-KV: several programs share one row of attention, and a second kernel combines their parts.

A part is (acc, lse) for a slice of the keys: lse = log sum exp(logit), acc = softmax(logits) @ V over the slice. The
result is lse = log sum_s exp(lse_s) and out = sum_s exp(lse_s - lse) acc_s. A slice without keys has lse = -inf, and
its acc is never read.
(Flash-Decoding: Dao, Haziza, Massa, Sizov, 2023.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

# More parts than this cost more in the combine kernel than they save.
MAX_SPLITS = 64


@dataclass(frozen=True)
class LaunchConfig:
    """Parameters to tune. They change results only by the order of summation."""

    block_n: int  # keys per step, a power of two
    num_warps: int
    num_stages: int  # depth of the pipeline
    waves: int  # programs wanted per multiprocessor, which sets the number of parts


def strides(tensor: torch.Tensor | None, number: int) -> tuple[int, ...]:
    """The first strides of an argument, which may be None."""
    return (0,) * number if tensor is None else tensor.stride()[:number]


@lru_cache
def _processors(device: torch.device) -> int:
    # Without a GPU the kernels run in Triton's interpreter. A few splits there also test the combine kernel.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def num_splits(programs: int, longest: int, config: LaunchConfig, device: torch.device) -> int:
    """The number of parts for a row of at most ``longest`` keys. ``programs``: size of the grid without parts.

    It depends only on shapes, never on lengths, because lengths are on the device and a captured CUDA graph keeps its
    grid. It is a power of two, which limits the number of compiled variants.
    """
    processors = config.waves * _processors(device)
    wanted = min(processors // max(programs, 1), -(-longest // config.block_n), MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


@triton.jit
def log_norm(m, norm):
    """Logsumexp from the maximum and norm of an online softmax; -inf for rows without keys. NaN stays NaN: as -inf, a
    part with a NaN among its keys would count as one without keys, and the others would make an answer without it."""
    return tl.where(norm == 0.0, float("-inf"), m + tl.log(tl.where(norm == 0.0, 1.0, norm)))

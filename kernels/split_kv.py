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


@triton.jit
def combine_tokens(
    part_acc, part_lse, query_start_loc, scored_rows, out, lse, stride_ot, stride_oh, stride_lr,
    QUERY_HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    HAS_OUT: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """Parts [T, Hq, SPLITS] of ragged query tokens, ROWS of (token, query head) of a request per program: ``out``, and
    ``lse`` of the request's scored row. Without output, only the parts of scored rows are there."""
    r = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    begin = tl.load(query_start_loc + r)
    q_len = tl.load(query_start_loc + r + 1) - begin
    scored = -1
    if SCORED:
        scored = (tl.load(scored_rows + r) - begin).to(tl.int32)
        scored = tl.where((scored >= 0) & (scored < q_len), scored, -1)
    row = first + tl.arange(0, ROWS)
    if HAS_OUT:
        i = row // QUERY_HEADS
        live = i < q_len
        if first >= q_len * QUERY_HEADS:
            return
    else:
        i = tl.zeros([ROWS], tl.int32) + scored
        live = row < QUERY_HEADS
        if scored < 0:
            return
    h = row % QUERY_HEADS
    token = (begin + i).to(tl.int64)
    part = (token * QUERY_HEADS + h)[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    part_log = tl.load(part_lse + part, mask=live[:, None], other=float("-inf"))
    top = tl.max(part_log, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(part_log - safe[:, None])
    norm = tl.sum(weight, 1)
    if HAS_OUT:
        d = tl.arange(0, D)
        # A part without keys was never written.
        some = part_log > float("-inf")
        acc = tl.load(part_acc + part[:, :, None] * D + d[None, None, :], mask=some[:, :, None], other=0.0)
        result = tl.sum(acc * weight[:, :, None], 1) / tl.where(norm > 0.0, norm, 1.0)[:, None]
        where = out + token[:, None] * stride_ot + h[:, None] * stride_oh + d[None, :]
        tl.store(where, result.to(out.dtype.element_ty), mask=live[:, None])
    if SCORED:
        tl.store(lse + r * stride_lr + h, log_norm(safe, norm), mask=live & (i == scored))

"""Attention over a selection, corrected for what the selection leaves out: after an attention that is not ours, which
leaves its logsumexp. ``sparse_attention`` does the same on its way.

The n tokens of a sequence that were not read are taken for n tokens of the context's mean key k and mean value v. Their
share of the softmax then follows from the sum that attention over the selection leaves behind, and is mixed in:

    w    = n exp(scale q.k) / (n exp(scale q.k) + exp(lse))
    out += w (v - out)

    n = seq_lens[r] - kept[r, g]        k, v = sums[slots[r], h] / summed[slots[r], h]

The sums are taken further before, to lens[r], but by LONGEST positions at most: what ``sum_context`` does with the same
arguments. A verification adds the few tokens that the one before it accepted, for which a launch of their own in each
layer would take longer than the reads.

A mean key underestimates what single tokens weigh, by the more the more keys differ, but those that weigh much are what
a selection holds. Where all is read, n is 0, and ``out`` stays as it is, to the bit.

query            [T, Hq, D]   float
out              [T, Hq, D]   like query, changed in place
lse              [T, Hq]      float32, natural logarithm, of attention over what was read
kv_cache         [B, H, N, 2D]  float; positions from lens on, and those summed before, are not read
block_table      [R, nb]      int32
lens             [R]          int32, positions that are in the cache for good; below summed, no sum changes
seq_lens         [R]          int32, the step's own tokens included
kept             [R, G]       int32, tokens that were read; G = 1 for all heads, or H; of 0 or less, ``out`` stays
slots            [R]          int64, distinct where not negative; -1 = padded row, which stays as it is
sums             [Z, H, 2D]   float32, as ``sum_context`` leaves them, changed in place
summed           [Z, H]       int32, changed in place; with nothing summed, attention stays as it is
query_start_loc  [R+1]        int32
scale            float
max_query_len    int          on the host, at least the longest row of the query
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts, unread_contracts
from .sum_context import FEW, take_further
from .unread_contracts import LONGEST

NUM_WARPS = 4
# Rows of the query that a program takes at a time.
MAX_ROWS = 32


@triton.jit
def mean_share(logit, unread, lse):
    """Weight in the softmax of ``unread`` tokens of a logit, beside tokens of logsumexp ``lse``."""
    return 1.0 / (1.0 + tl.exp(lse - logit - tl.log(unread.to(tl.float32))))


@triton.jit
def _unread_kernel(
    query, out, lse, kv_cache, block_table, lens, seq_lens, kept, slots, sums, summed, query_start_loc, scale,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_lt, stride_cb, stride_ch, stride_cn, stride_br,
    stride_kr, stride_kh, stride_sz, stride_sh, stride_uz, block_size,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    h, r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + r)
    if slot < 0:
        return
    d = tl.arange(0, D)
    key, value, count = take_further(
        kv_cache, block_table + r * stride_br, sums + slot * stride_sz + h * stride_sh, summed + slot * stride_uz + h,
        tl.load(lens + r), h, stride_cb, stride_ch, stride_cn, block_size, D, BLOCK, LONGEST
    )  # fmt: skip
    read = tl.load(kept + r * stride_kr + h * stride_kh)
    unread = tl.load(seq_lens + r) - read
    if (unread <= 0) | (count <= 0) | (read <= 0):
        return
    key, value = key / count, value / count
    begin = tl.load(query_start_loc + r).to(tl.int64)
    number = (tl.load(query_start_loc + r + 1) - begin) * GROUP
    for first in range(0, number, ROWS):
        row = first + tl.arange(0, ROWS)
        own = row < number
        token, head = begin + row // GROUP, h * GROUP + row % GROUP
        q = tl.load(
            query + (token * stride_qt + head * stride_qh)[:, None] + d[None, :], mask=own[:, None], other=0.0
        ).to(tl.float32)  # fmt: skip
        total = tl.load(lse + token * stride_lt + head, mask=own, other=0.0)
        share = mean_share(tl.sum(q * key[None, :], 1) * scale, unread, total)
        here = out + (token * stride_ot + head * stride_oh)[:, None] + d[None, :]
        old = tl.load(here, mask=own[:, None], other=0.0).to(tl.float32)
        new = old + share[:, None] * (value[None, :] - old)
        tl.store(here, new.to(out.dtype.element_ty), mask=own[:, None])


def add_unread(
    query: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor,
    lens: torch.Tensor, seq_lens: torch.Tensor, kept: torch.Tensor, slots: torch.Tensor, sums: torch.Tensor,
    summed: torch.Tensor, query_start_loc: torch.Tensor, scale: float, max_query_len: int,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    unread_contracts.add_unread(
        query, out, lse, kv_cache, block_table, lens, seq_lens, kept, slots, sums, summed, query_start_loc,
        max_query_len,
    )  # fmt: skip
    _, query_heads, size = query.shape
    contracts.head_size(size)
    rows, heads = slots.shape[0], sums.shape[1]
    if rows == 0:
        return
    group = query_heads // heads
    _unread_kernel[(heads, rows)](
        query, out, lse, kv_cache, block_table, lens, seq_lens, kept, slots, sums, summed, query_start_loc, scale,
        *query.stride()[:2], *out.stride()[:2], lse.stride(0), *kv_cache.stride()[:3], block_table.stride(0),
        kept.stride(0), kept.stride(1) if kept.shape[1] > 1 else 0, *sums.stride()[:2], summed.stride(0),
        kv_cache.shape[2], GROUP=group, ROWS=min(triton.next_power_of_2(group * max_query_len), MAX_ROWS), D=size,
        BLOCK=FEW, LONGEST=LONGEST, num_warps=NUM_WARPS,
    )  # fmt: skip

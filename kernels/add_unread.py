"""Attention over a selection, corrected for what the selection leaves out.

The n tokens of a sequence that were not read are taken for n tokens of the context's mean key k and mean value v. Their
share of the softmax then follows from the sum that attention over the selection leaves behind, and is mixed in:

    w    = n exp(scale q.k) / (n exp(scale q.k) + exp(lse))
    out += w (v - out)

    n = seq_lens[r] - kept[r, g]        k, v = sums[slots[r], h] / summed[slots[r], h]

A mean key underestimates what single tokens weigh, by the more the more keys differ, but those that weigh much are what
a selection holds. Where all is read, n is 0, and ``out`` stays as it is, to the bit.

query            [T, Hq, D]   float
out              [T, Hq, D]   like query, changed in place
lse              [T, Hq]      float32, natural logarithm, of attention over what was read
seq_lens         [R]          int32, the step's own tokens included
kept             [R, G]       int32, tokens that were read; G = 1 for all heads, or H
slots            [R]          int64; -1 = padded row, which stays as it is
sums             [Z, H, 2D]   float32, as ``sum_context`` leaves them
summed           [Z, H]       int32; a row of 0 stays as it is
query_start_loc  [R+1]        int32
scale            float
max_query_len    int          on the host, at least the longest row of the query
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts, unread_contracts

NUM_WARPS = 1


@triton.jit
def _unread_kernel(
    query, out, lse, seq_lens, kept, slots, sums, summed, query_start_loc, scale,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_lt, stride_kr, stride_kh, stride_sz, stride_sh, stride_uz,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    h, r, i = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = tl.load(slots + r)
    begin = tl.load(query_start_loc + r)
    if (slot < 0) | (i >= tl.load(query_start_loc + r + 1) - begin):
        return
    unread = tl.load(seq_lens + r) - tl.load(kept + r * stride_kr + h * stride_kh)
    count = tl.load(summed + slot * stride_uz + h)
    if (unread <= 0) | (count <= 0):
        return
    d = tl.arange(0, D)
    sums += slot * stride_sz + h * stride_sh
    key, value = tl.load(sums + d) / count, tl.load(sums + D + d) / count
    token = (begin + i).to(tl.int64)
    g = tl.arange(0, HEADS)
    head = h * GROUP + g
    own = g < GROUP
    q = tl.load(
        query + token * stride_qt + head[:, None] * stride_qh + d[None, :], mask=own[:, None], other=0.0
    ).to(tl.float32)  # fmt: skip
    weight = tl.sum(q * key[None, :], 1) * scale + tl.log(unread.to(tl.float32))
    share = 1.0 / (1.0 + tl.exp(tl.load(lse + token * stride_lt + head, mask=own, other=0.0) - weight))
    here = out + token * stride_ot + head[:, None] * stride_oh + d[None, :]
    old = tl.load(here, mask=own[:, None], other=0.0).to(tl.float32)
    new = old + share[:, None] * (value[None, :] - old)
    tl.store(here, new.to(out.dtype.element_ty), mask=own[:, None])


def add_unread(
    query: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, seq_lens: torch.Tensor, kept: torch.Tensor,
    slots: torch.Tensor, sums: torch.Tensor, summed: torch.Tensor, query_start_loc: torch.Tensor, scale: float,
    max_query_len: int,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text."""
    unread_contracts.add_unread(
        query, out, lse, seq_lens, kept, slots, sums, summed, query_start_loc, max_query_len
    )  # fmt: skip
    tokens, query_heads, size = query.shape
    contracts.head_size(size)
    rows, heads = slots.shape[0], sums.shape[1]
    if rows == 0 or tokens == 0:
        return
    group = query_heads // heads
    _unread_kernel[(heads, rows, max_query_len)](
        query, out, lse, seq_lens, kept, slots, sums, summed, query_start_loc, scale,
        *query.stride()[:2], *out.stride()[:2], lse.stride(0), kept.stride(0),
        kept.stride(1) if kept.shape[1] > 1 else 0, *sums.stride()[:2], summed.stride(0),
        GROUP=group, HEADS=triton.next_power_of_2(group), D=size, num_warps=NUM_WARPS,
    )  # fmt: skip

"""An upper bound on the share of attention mass that each KV head has left unread, from the drawn tokens.

For query row i and draw j, with exact logits,

    x_ij = exp(logit_ij - lse_i) worth_j        lse_i = the logsumexp over the tokens that row i has read

has the unread mass in units of the read mass as its mean. With mean m_i and standard deviation s_i over n draws,

    u_i = m_i + z s_i / sqrt(n)        lost_i = u_i / (1 + u_i)

and the head's result is the largest lost_i of its query rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import padding
from ..contracts import checked
from . import contracts

MAX_BLOCK_M = 64
NUM_WARPS = 4


@triton.jit
def _bound_kernel(
    query, kv_cache, block_table, query_start_loc, positions, worth, lse, lost, scale, quantile, block_size,
    stride_qt, stride_qh, stride_cb, stride_ch, stride_cn, stride_tr, stride_pr, stride_wr, stride_lt, stride_or,
    GROUP: tl.constexpr, D: tl.constexpr, DRAWS: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, DRAWS)
    p = tl.load(positions + r * stride_pr + h * DRAWS + j)
    lost += r * stride_or + h
    if tl.max(p, 0) < 0:
        tl.store(lost, 0.0)
        return
    d = tl.arange(0, padding.padded(D))
    inside = d < D
    block = tl.load(block_table + r * stride_tr + p // block_size).to(tl.int64)
    where = block * stride_cb + h * stride_ch + (p % block_size).to(tl.int64) * stride_cn
    keys = padding.load(kv_cache + where[:, None] + d[None, :], inside[None, :], D).to(query.dtype.element_ty)
    drawn = tl.load(worth + r * stride_wr + h * DRAWS + j)
    begin = tl.load(query_start_loc + r)
    rows = (tl.load(query_start_loc + r + 1) - begin) * GROUP
    worst = 0.0
    for tile in range(TILES):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        live = m < rows
        token = (begin + m // GROUP).to(tl.int64)
        head = h * GROUP + m % GROUP
        mask = padding.both(live[:, None], inside[None, :], D)
        q = tl.load(query + token[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :], mask=mask, other=0.0)
        read = tl.load(lse + token * stride_lt + head, mask=live, other=0.0)
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        x = tl.exp(logits - read[:, None]) * drawn[None, :]
        mean = tl.sum(x, 1) / DRAWS
        apart = x - mean[:, None]
        variance = tl.sum(apart * apart, 1) / (DRAWS - 1)
        upper = mean + quantile * tl.sqrt(variance / DRAWS)
        share = upper / (1.0 + upper)
        share = tl.where(share == share, share, 1.0)
        worst = tl.maximum(worst, tl.max(tl.where(live, share, 0.0), 0))
    tl.store(lost, worst)


@checked(contracts.bound_lost)
def bound_lost(
    query, kv_cache, block_table, query_start_loc, positions, worth, lse, scale, quantile, max_query_len, lost
) -> None:
    rows, heads, draws = positions.shape
    size, group = query.shape[2], query.shape[1] // kv_cache.shape[1]
    if rows == 0:
        return
    block_m = min(max(triton.next_power_of_2(max_query_len * group), 16), MAX_BLOCK_M)
    _bound_kernel[(heads, rows)](
        query, kv_cache, block_table, query_start_loc, positions, worth, lse, lost, scale, quantile, kv_cache.shape[2],
        *query.stride()[:2], *kv_cache.stride()[:3], block_table.stride(0), positions.stride(0), worth.stride(0),
        lse.stride(0), lost.stride(0), GROUP=group, D=size, DRAWS=draws, BLOCK_M=block_m,
        TILES=triton.cdiv(max_query_len * group, block_m), num_warps=NUM_WARPS,
    )  # fmt: skip

"""Combines the parts of draft attention, and finds the scored rows of the query, for both kernels.

Scored token c of a request and head i of KV head h are row (h * C + c) * GROUP + i of ``scores`` and ``lse``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .split_kv import log_norm


@triton.jit
def scored_token(scored_rows, c, begin, q_len, C: tl.constexpr):
    """Index of scored token c within its request, or -1. ``c`` may be a vector and may be out of range."""
    token = (tl.load(scored_rows + c, mask=c < C, other=-1) - begin).to(tl.int32)
    return tl.where((token >= 0) & (token < q_len), token, -1)


@triton.jit
def combine_tokens(
    part_acc, part_lse, query_start_loc, requests, scored_rows, out, lse, stride_wr, stride_ot, stride_oh, stride_lr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, HAS_OUT: tl.constexpr, SCORED: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Each program writes ROWS rows of a request: ``out``, and ``lse`` of scored rows.

    With output, a row is a query token and a query head, and the parts are [T, Hq, SPLITS]. Without output, it is a row
    of ``lse``, and the parts are [R, C * Hq, SPLITS]; with SOME, R counts the entries of ``requests``. Parts exist only
    for scored tokens then.
    """
    entry = tl.program_id(1).to(tl.int64)
    r = entry
    if SOME:
        r = tl.load(requests + entry)
        if r < 0:
            return
    first = tl.program_id(0) * ROWS
    begin = tl.load(query_start_loc + r)
    q_len = tl.load(query_start_loc + r + 1) - begin
    row = first + tl.arange(0, ROWS)
    if HAS_OUT:
        if first >= q_len * HEADS * GROUP:
            return
        i = row // (HEADS * GROUP)
        live = i < q_len
        h = row % (HEADS * GROUP)
        token = (begin + i).to(tl.int64)
        part = token * (HEADS * GROUP) + h
    else:
        i = scored_token(scored_rows + r * stride_wr, row // GROUP % C, begin, q_len, C)
        live = (row < HEADS * C * GROUP) & (i >= 0)
        part = entry * (HEADS * C * GROUP) + row
    part = part[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    part_log = tl.load(part_lse + part, mask=live[:, None], other=float("-inf"))
    top = tl.max(part_log, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(part_log - safe[:, None])
    norm = tl.sum(weight, 1)
    if HAS_OUT:
        d = tl.arange(0, D)
        # The accumulator of a part without keys was never written.
        some = part_log > float("-inf")
        acc = tl.load(part_acc + part[:, :, None] * D + d[None, None, :], mask=some[:, :, None], other=0.0)
        result = tl.sum(acc * weight[:, :, None], 1) / tl.where(norm > 0.0, norm, 1.0)[:, None]
        where = out + token[:, None] * stride_ot + h[:, None] * stride_oh + d[None, :]
        tl.store(where, result.to(out.dtype.element_ty), mask=live[:, None])
        if SCORED:
            for c in tl.static_range(C):
                chosen = live & (i == scored_token(scored_rows + r * stride_wr, c, begin, q_len, C))
                row_of_lse = (h // GROUP * C + c) * GROUP + h % GROUP
                tl.store(lse + r * stride_lr + row_of_lse, log_norm(safe, norm), mask=chosen)
    else:
        tl.store(lse + r * stride_lr + row, log_norm(safe, norm), mask=live)

"""The kernels of ``draft_attention``: attention to a part of the keys, and the combination of the parts. The file of
that name states what they compute, and launches them.

Scored token c of a request and head i of KV head h are row (h * C + c) * GROUP + i of ``scores`` and ``lse``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import padding
from .soft_cap import soft_cap_logits
from .split_kv import log_norm


@triton.jit
def _scored_token(scored_rows, c, begin, q_len, C: tl.constexpr):
    """Index of scored token c within its request, or -1. ``c`` may be a vector and may be out of range."""
    token = (tl.load(scored_rows + c, mask=c < C, other=-1) - begin).to(tl.int32)
    return tl.where((token >= 0) & (token < q_len), token, -1)


@triton.jit
def _block_ids(table, step, length, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The block-table entries for the positions of a step, with as few loads as the two sizes allow."""
    if BLOCK_SIZE % BLOCK == 0:  # one block holds the whole step
        first = step * BLOCK
        ids = tl.load(table + first // BLOCK_SIZE, mask=first < length, other=0)
    elif BLOCK % BLOCK_SIZE == 0:  # whole blocks
        entry = step * (BLOCK // BLOCK_SIZE) + tl.arange(0, BLOCK // BLOCK_SIZE)
        ids = tl.load(table + entry, mask=entry * BLOCK_SIZE < length, other=0)
    else:
        p = step * BLOCK + tl.arange(0, BLOCK)
        ids = tl.load(table + p // BLOCK_SIZE, mask=p < length, other=0)
    return ids


@triton.jit
def _spread_ids(ids, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The ids from ``_block_ids`` as int64, for each position, or one id for all positions."""
    if (BLOCK_SIZE % BLOCK != 0) and (BLOCK % BLOCK_SIZE == 0):
        ids = tl.reshape(tl.broadcast_to(ids[:, None], (BLOCK // BLOCK_SIZE, BLOCK_SIZE)), (BLOCK,))
    return ids.to(tl.int64)


@triton.jit
def _store(target, value, rows, j, visible, whole):
    """Store the scores of a step that the rows see. Without a mask along the columns, the stores are vectors."""
    if whole:
        tl.store(target, value, mask=rows[:, None])
    else:
        tl.store(target, value, mask=rows[:, None] & (j[None, :] < visible[:, None]))


@triton.jit
def draft_kernel(
    query, kv_cache, block_table, seq_lens, query_start_loc, requests, scored_rows, scores, out, lse, part_acc,
    part_lse, scale, soft_cap,
    stride_qt, stride_qh, stride_b, stride_h, stride_n, stride_tr, stride_sr, stride_sh, stride_wr, stride_ot,
    stride_oh, stride_lr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    SMALL_DOT: tl.constexpr,
):  # fmt: skip
    HAS_OUT: tl.constexpr = out is not None
    SCORED: tl.constexpr = lse is not None
    # Heads vary fastest: the heads of a token are neighbours in vLLM's cache, so they should run at the same time.
    head = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    split = tl.program_id(1)
    entry = tl.program_id(2).to(tl.int64)
    r = entry
    if requests is not None:
        r = tl.load(requests + entry)
        if r < 0:
            return
    begin = tl.load(query_start_loc + r)
    q_len = tl.load(query_start_loc + r + 1) - begin
    length = tl.load(seq_lens + r)
    # A tile row is a query token and a head of the group, tokens outermost. Without output there are rows of scored
    # tokens only, in the order of the scores.
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_head = head * GROUP + m % GROUP
    scored_row = head * (C * GROUP)  # the first one of this KV head in ``scores`` and ``lse``
    if SCORED:
        wanted = scored_rows + r * stride_wr
    if HAS_OUT:
        i = m // GROUP
        live = i < q_len
        if tile * BLOCK_M >= q_len * GROUP:
            return
        token = (begin + i).to(tl.int64)
        part = (token * (HEADS * GROUP) + q_head) * SPLITS + split
        if SCORED:
            # Both scored tokens may be the same, so each has its own mask over the rows of the tile.
            is_first = live & (i == _scored_token(wanted, 0, begin, q_len, C))
            is_second = live & (i == _scored_token(wanted, C - 1, begin, q_len, C))
            scored_row += m % GROUP
    else:
        i = _scored_token(wanted, m // GROUP, begin, q_len, C)
        live = i >= 0
        if tl.max(i, 0) < 0:
            return
        token = (begin + i).to(tl.int64)
        part = (entry * (HEADS * C * GROUP) + scored_row + m) * SPLITS + split
        is_first = live
        scored_row += m

    visible = length - (q_len - 1 - i)
    all_visible = length - (q_len - 1)

    steps = tl.cdiv(length, BLOCK)
    per_split = tl.cdiv(steps, SPLITS)
    lo = split * per_split
    hi = tl.minimum(lo + per_split, steps)
    if SPLITS > 1 and lo >= hi:
        tl.store(part_lse + part, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=live)
        return

    d = tl.arange(0, padding.padded(D))
    elements = (d < D)[None, :]
    column = tl.arange(0, BLOCK)
    live_elements = padding.both(live[:, None], elements, D)
    of_query = query + token[:, None] * stride_qt + q_head[:, None] * stride_qh + d[None, :]
    q = tl.load(of_query, mask=live_elements, other=0.0)
    keys = kv_cache + head.to(tl.int64) * stride_h
    table = block_table + r * stride_tr
    if SMALL_DOT:
        # The logits of the scored rows are computed a second time, in a small tile: they are then stored with less
        # rearranging than a few rows of the large tile. 7 query rows of 4 heads: 0.298 ms, else 0.348 (H200, 16 x 32k).
        m_scored = tl.arange(0, 16)
        if C == 1:
            # All rows of one token have the same bound. With a bound for each row in the store's mask, the whole kernel
            # takes 1.5 times as long: 7 query rows of 4 heads, 0.429 ms instead of 0.293 (H200, 16 x 32k, fp32 scores).
            only = _scored_token(wanted, 0, begin, q_len, C)
            live_scored = m_scored < tl.where(only >= 0, GROUP, 0)
            visible_scored = length - (q_len - 1 - only)
            token_scored = (begin + tl.maximum(only, 0)).to(tl.int64)
        else:
            i_scored = _scored_token(wanted, m_scored // GROUP, begin, q_len, C)
            live_scored = i_scored >= 0
            visible_scored = (length - (q_len - 1 - i_scored))[:, None]
            token_scored = (begin + i_scored).to(tl.int64)[:, None]
        where = scores + r * stride_sr + (head * (C * GROUP) + m_scored).to(tl.int64) * stride_sh
        q_scored = tl.load(
            query + token_scored * stride_qt + (head * GROUP + m_scored % GROUP)[:, None] * stride_qh + d[None, :],
            mask=padding.both(live_scored[:, None], elements, D),
            other=0.0,
        )
    elif scores is not None:
        where = scores + r * stride_sr + scored_row.to(tl.int64) * stride_sh

    # Block ids are loaded one step ahead, into loop-carried registers. So loads of keys never wait for them, and the
    # pipeliner sees only one level of loads.
    ids = _block_ids(table, lo, length, BLOCK, BLOCK_SIZE)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Summed over the columns only at the end: a sum across warps in every step would need a barrier in every step.
    norm = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    acc = tl.zeros([BLOCK_M, padding.padded(D)], tl.float32)
    for step in range(lo, hi):
        j = step * BLOCK + column
        inside = j < length
        row = _spread_ids(ids, BLOCK, BLOCK_SIZE) * stride_b + (j % BLOCK_SIZE) * stride_n
        ids = _block_ids(table, step + 1, length, BLOCK, BLOCK_SIZE)
        pair = keys + row[:, None] + d[None, :]
        inside_elements = padding.both(inside[:, None], elements, D)
        k = tl.load(pair, mask=inside_elements, other=0.0).to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if soft_cap is not None:
            logits = soft_cap_logits(logits, soft_cap)
        if scores is not None:
            if SMALL_DOT:
                value = tl.dot(q_scored, tl.trans(k), input_precision="ieee") * scale
                if soft_cap is not None:
                    value = soft_cap_logits(value, soft_cap)
                value = value.to(scores.dtype.element_ty)
                tl.store(where[:, None] + j[None, :], value, mask=live_scored[:, None] & (j[None, :] < visible_scored))
            else:
                target = where[:, None] + j[None, :]
                value = logits.to(scores.dtype.element_ty)
                _store(target, value, is_first, j, visible, (step + 1) * BLOCK <= all_visible)
                if HAS_OUT and C == 2:
                    second = target + GROUP * stride_sh
                    _store(second, value, is_second, j, visible, (step + 1) * BLOCK <= all_visible)
        logits = tl.where(j[None, :] < visible[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # The maximum of a row is -inf if all its logits so far are masked, and -inf - -inf would be nan.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(logits - safe[:, None])
        rescale = tl.exp(top - safe)
        norm = norm * rescale[:, None] + weights
        top = new_top
        if HAS_OUT:
            v = tl.load(pair + D, mask=inside_elements, other=0.0).to(q.dtype)
            acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")

    total = tl.sum(norm, 1)
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if SPLITS > 1:
        tl.store(part_lse + part, log_norm(top, total), mask=live)
        if HAS_OUT:
            tl.store(part_acc + part[:, None] * D + d[None, :], acc, mask=live_elements)
    else:
        if SCORED:
            row_of_lse = lse + r * stride_lr + scored_row
            tl.store(row_of_lse, log_norm(top, total), mask=is_first)
            if HAS_OUT and C == 2:
                tl.store(row_of_lse + GROUP, log_norm(top, total), mask=is_second)
        if HAS_OUT:
            row_of_out = out + token[:, None] * stride_ot + q_head[:, None] * stride_oh
            tl.store(row_of_out + d[None, :], acc.to(out.dtype.element_ty), mask=live_elements)


@triton.jit
def combine_tokens(
    part_acc, part_lse, query_start_loc, requests, scored_rows, out, lse, stride_wr, stride_ot, stride_oh, stride_lr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Each program writes ROWS rows of a request: ``out``, and ``lse`` of scored rows.

    With ``out``, a row is a query token and a query head, and the parts are [T, Hq, SPLITS]. Without it, it is a row of
    ``lse``, and the parts are [R, C * Hq, SPLITS]; R counts the entries of ``requests``. Parts exist only for scored
    tokens then.
    """
    entry = tl.program_id(1).to(tl.int64)
    r = entry
    if requests is not None:
        r = tl.load(requests + entry)
        if r < 0:
            return
    first = tl.program_id(0) * ROWS
    begin = tl.load(query_start_loc + r)
    q_len = tl.load(query_start_loc + r + 1) - begin
    row = first + tl.arange(0, ROWS)
    if out is not None:
        if first >= q_len * HEADS * GROUP:
            return
        i = row // (HEADS * GROUP)
        live = i < q_len
        h = row % (HEADS * GROUP)
        token = (begin + i).to(tl.int64)
        part = token * (HEADS * GROUP) + h
    else:
        i = _scored_token(scored_rows + r * stride_wr, row // GROUP % C, begin, q_len, C)
        live = (row < HEADS * C * GROUP) & (i >= 0)
        part = entry * (HEADS * C * GROUP) + row
    part = part[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    part_log = tl.load(part_lse + part, mask=live[:, None], other=float("-inf"))
    top = tl.max(part_log, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(part_log - safe[:, None])
    norm = tl.sum(weight, 1)
    if out is not None:
        d = tl.arange(0, padding.padded(D))
        # The accumulator of a part without keys was never written.
        some = part_log > float("-inf")
        some = padding.both(some[:, :, None], (d < D)[None, None, :], D)
        acc = tl.load(part_acc + part[:, :, None] * D + d[None, None, :], mask=some, other=0.0)
        result = tl.sum(acc * weight[:, :, None], 1) / tl.where(norm > 0.0, norm, 1.0)[:, None]
        where = out + token[:, None] * stride_ot + h[:, None] * stride_oh + d[None, :]
        tl.store(where, result.to(out.dtype.element_ty), mask=padding.both(live[:, None], (d < D)[None, :], D))
        if lse is not None:
            for c in tl.static_range(C):
                chosen = live & (i == _scored_token(scored_rows + r * stride_wr, c, begin, q_len, C))
                row_of_lse = (h // GROUP * C + c) * GROUP + h % GROUP
                tl.store(lse + r * stride_lr + row_of_lse, log_norm(safe, norm), mask=chosen)
    else:
        tl.store(lse + r * stride_lr + row, log_norm(safe, norm), mask=live)

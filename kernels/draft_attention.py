"""Attention of a draft step that hands out the scores of one query row per request.

    token i of the q_len query tokens of request r sees p < seq_lens[r] - (q_len - 1 - i)
    logits[t, h, p] = scale * <query[t, h], key[r, p, h // (Hq / H)]>
    out[t, h] = sum_p softmax(logits[t, h])_p * value[r, p, h // (Hq / H)]       zeros where t sees nothing
    scores[r, h, p] = logits[scored_rows[r], h, p]                               p seen by that row; others untouched
    lse[r, h] = log sum_p exp(scores[r, h, p]), of the unrounded logits          -inf where the row sees nothing

The query rows of a request and the query heads of a KV head share one tile, so every key is read once for all of them,
and the scores are stored on the way: capturing costs no further pass over the keys. Split-KV over the context.

query            [T, Hq, D]     float32, float16 or bfloat16; D is 64 or 128; requests one after another
kv_cache         [B, H, N, 2D]  query's dtype, any strides but the last (1): key = [..., :D], value = [..., D:]
block_table      [R, nb]        int32; entries past ceil(seq_len / N) are stale and never followed
seq_lens         [R]            int32, keys that the last token of the request sees; at most nb * N and the width L
query_start_loc  [R + 1]        int32; q_len may be 0. Rows of ``out`` behind the last request are left untouched
scale            float          multiplies query . key
out              [T, Hq, D]     query's dtype, or None when only scores are wanted: then no value is read
scored_rows      [R]            int64, a row of the request in ``query``, or -1: its scores and lse stay untouched
scores           [R, Hq, L]     float32 or bfloat16, or None
lse              [R, Hq]        float32, natural logarithm; required with scores
max_query_len    int            bound of q_len; up to 16 is meant, more is right but reads the keys several times

Indexed, if all three of these are given (max_query_len is 1 then): the keys are the entries j of a list. Entry j is
position positions[r, j] for j < kept[r], and prefix_lens[r] + (j - kept[r]) from there on, up to seq_lens[r] - 1. The
column of ``scores`` is j. kept[r] = -1: request r reads everything, and its column is the position.

positions        [R, W]         int32, ascending, below seq_len
kept             [R]            int32, at most W
prefix_lens      [R]            int32, at most seq_len; not read where kept is -1

Products of 16-bit inputs are summed in fp32; the softmax weights are rounded to the cache's dtype for the second
product, as in FlashAttention. Scores may be bfloat16 to halve their traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import contracts
from .draft_config import FP32_CONFIG, LaunchConfig, launch_config
from .split_kv import COMBINE_ELEMENTS, combine_tokens, log_norm, num_splits

# Rows of the tile: at 128, the accumulator of head size 128 takes half the registers of 8 warps.
MAX_BLOCK_M = 128
FP32_MAX_BLOCK_M = 16


@triton.jit
def _block_ids(table, step, length, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The block-table entries of a step's positions: as few loads as the two sizes allow."""
    if BLOCK_SIZE % BLOCK == 0:  # the step lies in one block
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
    """What ``_block_ids`` loaded, for each position (or for all of them alike), as int64."""
    if (BLOCK_SIZE % BLOCK != 0) and (BLOCK % BLOCK_SIZE == 0):
        ids = tl.reshape(tl.broadcast_to(ids[:, None], (BLOCK // BLOCK_SIZE, BLOCK_SIZE)), (BLOCK,))
    return ids.to(tl.int64)


@triton.jit
def _listed(entries, step, kept, BLOCK: tl.constexpr):
    """The positions that a list holds for a step; 0 from ``kept`` on."""
    j = step * BLOCK + tl.arange(0, BLOCK)
    return tl.load(entries + j, mask=j < kept, other=0)


@triton.jit
def _position(listed, step, kept, prefix, BLOCK: tl.constexpr):
    j = step * BLOCK + tl.arange(0, BLOCK)
    return tl.where(j < kept, listed, prefix + (j - kept))


@triton.jit
def _draft_kernel(
    query, kv_cache, block_table, seq_lens, query_start_loc, scored_rows, positions, kept_lens, prefix_lens,
    scores, out, lse, part_acc, part_lse, scale,
    stride_qt, stride_qh, stride_b, stride_h, stride_n, stride_tr, stride_pr, stride_sr, stride_sh,
    stride_ot, stride_oh, stride_lr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, HAS_OUT: tl.constexpr,
    SCORED: tl.constexpr, HAS_SCORES: tl.constexpr, SMALL_DOT: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest: the heads of a token lie side by side in vLLM's cache, and run at the same time.
    head = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    split = tl.program_id(1)
    r = tl.program_id(2).to(tl.int64)
    begin = tl.load(query_start_loc + r)
    q_len = tl.load(query_start_loc + r + 1) - begin
    length = tl.load(seq_lens + r)
    scored = -1
    if SCORED:
        scored = (tl.load(scored_rows + r) - begin).to(tl.int32)  # counted within the request
        scored = tl.where((scored >= 0) & (scored < q_len), scored, -1)

    # A tile row is a query token and a head of the group, tokens outermost; without output, the scored token alone.
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if HAS_OUT:
        i = m // GROUP
        live = i < q_len
        if tile * BLOCK_M >= q_len * GROUP:
            return
    else:
        i = tl.zeros([BLOCK_M], tl.int32) + scored
        live = m < GROUP
        if scored < 0:
            return
    token = (begin + i).to(tl.int64)
    q_head = head * GROUP + m % GROUP
    is_scored = live & (i == scored)

    # Entries that the last token sees: a list and what follows it, or every position.
    kept = 0
    prefix = 0
    count = length
    if INDEXED:
        kept = tl.load(kept_lens + r)
        prefix = tl.where(kept < 0, 0, tl.load(prefix_lens + r))
        # A padded row has nothing to read, whatever its list says.
        kept = tl.where(length > 0, tl.maximum(kept, 0), 0)
        count = kept + tl.maximum(length - prefix, 0)
    visible = count - (q_len - 1 - i)
    scored_visible = count - (q_len - 1 - scored)

    steps = tl.cdiv(count, BLOCK)
    per_split = tl.cdiv(steps, SPLITS)
    lo = split * per_split
    hi = tl.minimum(lo + per_split, steps)
    part = (token * (HEADS * GROUP) + q_head) * SPLITS + split
    if SPLITS > 1 and lo >= hi:
        tl.store(part_lse + part, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=live)
        return

    d = tl.arange(0, D)
    column = tl.arange(0, BLOCK)
    q = tl.load(
        query + token[:, None] * stride_qt + q_head[:, None] * stride_qh + d[None, :], mask=live[:, None], other=0.0
    )
    keys = kv_cache + head.to(tl.int64) * stride_h
    table = block_table + r * stride_tr
    entries = positions + r * stride_pr
    if SMALL_DOT:
        # The scored rows alone, once more: in a tile of their own their logits reach memory with less to rearrange than
        # a few rows of the large tile would. 7 query rows of 4 heads: 0.298 ms, without this 0.348 (H200, 16 x 32k).
        m_scored = tl.arange(0, 16)
        live_scored = m_scored < tl.where(scored >= 0, GROUP, 0)
        scored_head = head * GROUP + m_scored
        where = scores + r * stride_sr + scored_head.to(tl.int64) * stride_sh
        q_scored = tl.load(
            query
            + (begin + tl.maximum(scored, 0)).to(tl.int64) * stride_qt
            + scored_head[:, None] * stride_qh
            + d[None, :],
            mask=live_scored[:, None],
            other=0.0,
        )
    else:
        where = scores + r * stride_sr + q_head.to(tl.int64) * stride_sh

    # Block ids are loaded one step ahead (listed positions two), into registers that the loop carries: the loads of
    # keys then never wait for them, and the pipeliner sees one level of loads.
    listed = column
    p = lo * BLOCK + column
    if INDEXED:
        p = _position(_listed(entries, lo, kept, BLOCK), lo, kept, prefix, BLOCK)
        ids = tl.load(table + p // BLOCK_SIZE, mask=p < length, other=0)
        listed = _listed(entries, lo + 1, kept, BLOCK)
    else:
        ids = _block_ids(table, lo, length, BLOCK, BLOCK_SIZE)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Summed over the columns at the end only: a sum across warps in every step would be a barrier in every step.
    norm = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for step in range(lo, hi):
        j = step * BLOCK + column
        inside = j < count
        if INDEXED:
            row = ids.to(tl.int64) * stride_b + (p % BLOCK_SIZE) * stride_n
            p = _position(listed, step + 1, kept, prefix, BLOCK)
            ids = tl.load(table + p // BLOCK_SIZE, mask=p < length, other=0)
            listed = _listed(entries, step + 2, kept, BLOCK)
        else:
            row = _spread_ids(ids, BLOCK, BLOCK_SIZE) * stride_b + (j % BLOCK_SIZE) * stride_n
            ids = _block_ids(table, step + 1, length, BLOCK, BLOCK_SIZE)
        pair = keys + row[:, None] + d[None, :]
        k = tl.load(pair, mask=inside[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SCORES:
            if SMALL_DOT:
                value = (tl.dot(q_scored, tl.trans(k), input_precision="ieee") * scale).to(scores.dtype.element_ty)
                tl.store(where[:, None] + j[None, :], value, mask=live_scored[:, None] & (j < scored_visible)[None, :])
            else:
                # Without a mask along the columns the stores are vectors.
                target = where[:, None] + j[None, :]
                value = logits.to(scores.dtype.element_ty)
                if (step + 1) * BLOCK <= scored_visible:
                    tl.store(target, value, mask=is_scored[:, None])
                else:
                    tl.store(target, value, mask=is_scored[:, None] & (j < scored_visible)[None, :])
        logits = tl.where(j[None, :] < visible[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # A row that has seen only masked logits has maximum -inf, and -inf - -inf would be nan.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(logits - safe[:, None])
        rescale = tl.exp(top - safe)
        norm = norm * rescale[:, None] + weights
        top = new_top
        if HAS_OUT:
            v = tl.load(pair + D, mask=inside[:, None], other=0.0)
            acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")

    total = tl.sum(norm, 1)
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if SPLITS > 1:
        tl.store(part_lse + part, log_norm(top, total), mask=live)
        if HAS_OUT:
            tl.store(part_acc + part[:, None] * D + d[None, :], acc, mask=live[:, None])
    else:
        if SCORED:
            tl.store(lse + r * stride_lr + q_head, log_norm(top, total), mask=is_scored)
        if HAS_OUT:
            row_of_out = out + token[:, None] * stride_ot + q_head[:, None] * stride_oh
            tl.store(row_of_out + d[None, :], acc.to(out.dtype.element_ty), mask=live[:, None])


def draft_attention(
    query: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor, scale: float, out: torch.Tensor | None,
    scored_rows: torch.Tensor | None = None, scores: torch.Tensor | None = None, lse: torch.Tensor | None = None,
    max_query_len: int = 1, positions: torch.Tensor | None = None, kept: torch.Tensor | None = None,
    prefix_lens: torch.Tensor | None = None, *, config: LaunchConfig | None = None,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text. The scratch
    for the parts comes from torch's allocator, which a CUDA graph capture serves from the graph's own pool."""
    contracts.draft_attention(
        query, kv_cache, block_table, seq_lens, query_start_loc, out, scored_rows, scores, lse, max_query_len,
        positions, kept, prefix_lens,
    )  # fmt: skip
    tokens, query_heads, size = query.shape
    contracts.head_size(size)
    rows = seq_lens.shape[0]
    if rows == 0 or tokens == 0:
        return
    heads, block_size = kv_cache.shape[1:3]
    group = query_heads // heads
    tile_rows = group * max_query_len if out is not None else group
    exact = query.dtype == torch.float32
    block_m = min(max(16, triton.next_power_of_2(tile_rows)), FP32_MAX_BLOCK_M if exact else MAX_BLOCK_M)
    tiles = triton.cdiv(tile_rows, block_m)
    if config is None:
        config = FP32_CONFIG if exact else launch_config(size, block_m, positions is not None)
    longest = block_table.shape[1] * block_size
    splits = num_splits(rows * heads * tiles, longest, config.block_n, query.device, config.waves)
    # Unused pointers still have to be pointers, and of a dtype that the kernel may name.
    part_lse = torch.empty(tokens if splits > 1 else 1, query_heads, splits, dtype=torch.float32, device=query.device)
    part_acc = part_lse if out is None or splits == 1 else part_lse.new_empty(*part_lse.shape, size)
    scored = scored_rows is not None and lse is not None
    indexed = positions is not None
    none = part_lse
    # Only tiles larger than the small one gain; and with several tiles, each would write the same scores again.
    small_dot = scores is not None and out is not None and block_m > 16 and tiles == 1 and group <= 16
    shared = {"SPLITS": splits, "D": size, "HAS_OUT": out is not None, "SCORED": scored}
    _draft_kernel[(heads * tiles, splits, rows)](
        query, kv_cache, block_table, seq_lens, query_start_loc, scored_rows if scored else seq_lens,
        positions if indexed else seq_lens, kept if indexed else seq_lens, prefix_lens if indexed else seq_lens,
        none if scores is None else scores, none if out is None else out, none if lse is None else lse,
        part_acc, part_lse, scale,
        *query.stride()[:2], *kv_cache.stride()[:3], block_table.stride(0), positions.stride(0) if indexed else 0,
        *((0, 0) if scores is None else scores.stride()[:2]), *((0, 0) if out is None else out.stride()[:2]),
        0 if lse is None else lse.stride(0),
        HEADS=heads, GROUP=group, BLOCK_SIZE=block_size, TILES=tiles, BLOCK_M=block_m, BLOCK=config.block_n,
        HAS_SCORES=scores is not None, SMALL_DOT=small_dot, INDEXED=indexed, **shared,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits == 1:
        return
    total_rows = query_heads * (max_query_len if out is not None else 1)
    per_program = min(max(1, COMBINE_ELEMENTS // (splits * size)), triton.next_power_of_2(total_rows))
    combine_tokens[(triton.cdiv(total_rows, per_program), rows)](
        part_acc, part_lse, query_start_loc, scored_rows if scored else seq_lens,
        none if out is None else out, none if lse is None else lse,
        *((0, 0) if out is None else out.stride()[:2]), 0 if lse is None else lse.stride(0),
        QUERY_HEADS=query_heads, ROWS=per_program, **shared, num_warps=4,
    )  # fmt: skip

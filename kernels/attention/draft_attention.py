"""Attention of a draft step that also stores the scores of one or two query rows per request.

    token i of the q_len query tokens of request r sees p < seq_lens[r] - (q_len - 1 - i)
    logits[t, h, p] = scale * <query[t, h], key[r, p, h // (Hq / H)]>
    out[t, h] = sum_p softmax(logits[t, h])_p * value[r, p, h // (Hq / H)]       zeros where t sees nothing
    scores[r, s, p] = logits[scored_rows[r, c], h, p]                            p seen by that row; others untouched
    lse[r, s] = log sum_p exp(scores[r, s, p]), of the unrounded logits          -inf where the row sees nothing

C rows of a request may be scored: one row (a draft's sampled token), or two (the first and the last row of a
verification, from which self-speculation makes its selection; Vegas, arXiv 2602.07223). Scored row c and head i of the
GROUP = Hq / H query heads of KV head k have the index s = (k * C + c) * GROUP + i. So the rows of a KV head are
consecutive, and ``accumulate_mass`` handles C * Hq heads in the same way as Hq.

The query rows of a request and the query heads of a KV head share one tile, so each key is read once for all of them.
The scores are stored during attention, so capturing needs no further pass over the keys. Split-KV over the context.

query            [T, Hq, D]     float32, float16 or bfloat16; D is 64 or 128; requests one after another
kv_cache         [B, H, N, 2D]  query's dtype, any strides but the last (1): key = [..., :D], value = [..., D:]
block_table      [R, nb]        int32; entries past ceil(seq_len / N) are stale and never followed
seq_lens         [R]            int32, keys that the last token of the request sees; at most nb * N and the width L
query_start_loc  [R + 1]        int32; q_len may be 0. Rows of ``out`` after the last request stay untouched
scale            float          multiplies query . key
out              [T, Hq, D]     query's dtype; None if only scores or lse are wanted: then no values are read
scored_rows      [R, C]         int64, a row of the request in ``query``, or -1: its scores and lse stay untouched. C is
                                1 or 2; the two may be one row, whose scores are then written twice
scores           [R, C * Hq, L] float32 or bfloat16, or None
lse              [R, C * Hq]    float32, natural logarithm; required with scores
max_query_len    int            bound of q_len; meant for up to 16; larger is correct but reads the keys several times
requests         [A]            int64, the requests to work on, each once, -1: none; the outputs of all other requests
                                stay untouched. None: all requests. The grid depends on A

``requests`` is for batches in which few requests have work, as in an audit. Without it, a row without scored rows and
output still takes its programs, and the keys are cut into as many parts as suit a full batch.

Products of 16-bit inputs are summed in fp32. The softmax weights are rounded to the cache's dtype for the second
product, as in FlashAttention. Scores may be bfloat16, which halves their memory traffic.
"""

from __future__ import annotations

import torch
import triton

from ..contracts import head_size
from . import contracts
from .draft_combine import combine_tokens
from .draft_config import FP32_CONFIG, LaunchConfig, launch_config
from .draft_kernel import draft_kernel
from .split_kv import COMBINE_ELEMENTS, num_splits

# Rows of a tile. With 128 rows, the accumulator of head size 128 takes half the registers of 8 warps.
MAX_BLOCK_M = 128
FP32_MAX_BLOCK_M = 16


def draft_attention(
    query: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor, scale: float, out: torch.Tensor | None,
    scored_rows: torch.Tensor | None = None, scores: torch.Tensor | None = None, lse: torch.Tensor | None = None,
    max_query_len: int = 1, requests: torch.Tensor | None = None, *, config: LaunchConfig | None = None,
) -> None:  # fmt: skip
    """Launch on the current stream, without waiting for the device; arguments as in the module's text. Temporary
    memory for the parts comes from torch's allocator, under CUDA graph capture from the graph's own pool."""
    contracts.draft_attention(
        query, kv_cache, block_table, seq_lens, query_start_loc, out, scored_rows, scores, lse, max_query_len, requests
    )  # fmt: skip
    tokens, query_heads, size = query.shape
    head_size(size)
    rows = (seq_lens if requests is None else requests).shape[0]
    if rows == 0 or tokens == 0:
        return
    heads, block_size = kv_cache.shape[1:3]
    group = query_heads // heads
    scored = scored_rows is not None and lse is not None
    scored_tokens = scored_rows.shape[1] if scored else 1
    tile_rows = group * (max_query_len if out is not None else scored_tokens)
    exact = query.dtype == torch.float32
    block_m = min(max(16, triton.next_power_of_2(tile_rows)), FP32_MAX_BLOCK_M if exact else MAX_BLOCK_M)
    tiles = triton.cdiv(tile_rows, block_m)
    if config is None:
        programs = rows * heads * tiles
        config = FP32_CONFIG if exact else launch_config(size, block_m, programs)
    longest = block_table.shape[1] * block_size
    splits = num_splits(rows * heads * tiles, longest, config.block_n, query.device, config.waves)
    # Unused pointers must still be pointers, with a dtype that the kernel can name.
    parts = (tokens if out is not None else rows * scored_tokens) if splits > 1 else 1
    part_lse = torch.empty(parts, query_heads, splits, dtype=torch.float32, device=query.device)
    part_acc = part_lse if out is None or splits == 1 else part_lse.new_empty(*part_lse.shape, size)
    listed = requests is not None
    none = part_lse
    # The small product helps only beside a larger tile. With several tiles, each would write the same scores again.
    small_dot = scores is not None and out is not None and block_m > 16 and tiles == 1 and scored_tokens * group <= 16
    shared = {
        "HEADS": heads, "GROUP": group, "C": scored_tokens, "D": size, "SPLITS": splits,
        "HAS_OUT": out is not None, "SCORED": scored, "SOME": listed,
    }  # fmt: skip
    tail = (
        scored_rows.stride(0) if scored else 0, *((0, 0) if out is None else out.stride()[:2]),
        0 if lse is None else lse.stride(0),
    )  # fmt: skip
    draft_kernel[(heads * tiles, splits, rows)](
        query, kv_cache, block_table, seq_lens, query_start_loc, requests if listed else seq_lens,
        scored_rows if scored else seq_lens,
        none if scores is None else scores, none if out is None else out, none if lse is None else lse,
        part_acc, part_lse, scale,
        *query.stride()[:2], *kv_cache.stride()[:3], block_table.stride(0),
        *((0, 0) if scores is None else scores.stride()[:2]), *tail,
        BLOCK_SIZE=block_size, TILES=tiles, BLOCK_M=block_m, BLOCK=config.block_n,
        HAS_SCORES=scores is not None, SMALL_DOT=small_dot, **shared,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits == 1:
        return
    total_rows = query_heads * (max_query_len if out is not None else scored_tokens)
    per_program = min(max(1, COMBINE_ELEMENTS // (splits * size)), triton.next_power_of_2(total_rows))
    combine_tokens[(triton.cdiv(total_rows, per_program), rows)](
        part_acc, part_lse, query_start_loc, requests if listed else seq_lens, scored_rows if scored else seq_lens,
        none if out is None else out, none if lse is None else lse, *tail,
        ROWS=per_program, **shared, num_warps=4,
    )  # fmt: skip

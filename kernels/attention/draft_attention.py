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

``requests`` is for batches in which few requests have work, as in an audit. Without it, a row without scored rows and
output still takes its programs, and the keys are cut into as many parts as suit a full batch.

Products of 16-bit inputs are summed in fp32. The softmax weights are rounded to the cache's dtype for the second
product, as in FlashAttention. Scores may be bfloat16, which halves their memory traffic.
"""

from __future__ import annotations

import torch
import triton

from .. import padding
from ..contracts import checked, head_size
from . import contracts
from .draft_kernel import combine_tokens, draft_kernel
from .split_kv import LaunchConfig, num_splits, strides

# Rows of a tile, by padded head size. With these, the largest accumulator takes half the registers of 8 warps.
MAX_BLOCK_M = {64: 128, 128: 128, 256: 64}
FP32_MAX_BLOCK_M = 16
# Elements of the parts that one program of the combine kernel holds: 32 registers of each of its threads.
COMBINE_ELEMENTS = 4096

# By (padded head size, tile rows). Those of 256 were not measured. The others are for sizes without padding, on an H200
# with 16 requests of 32k. Marked *: the best of 24 to 72 configurations, bf16 scores, 2026-11-22:
# (64, 16) 4 query heads per KV head, 1 query row: 0.280 ms (0.282 before); (64, 32) 7 query rows:
# 0.298 ms (0.348 before; most of the gain by `SMALL_DOT`); (128, 16) 2 query heads: 1 row 0.514 ms (0.522), 7 rows
# 0.519 ms (0.526). Marked +: the best of 8 to 11, fp32 scores, 8 query heads, 7 rows, 2026-11-26: 0.364 ms (no other
# was 1% faster) and 0.746 ms (0.757). With one query head per KV head, tiles have 16 rows, and no configuration was
# faster (docs/results/h200-draft-sweep.json). The others are not measured but reasoned: 48 to 64 KiB of keys and values
# in flight, two to four programs at once. (128, 32) also serves a verification of 6 rows with two scored ones (4 query
# heads per KV head): its second product costs 8 registers per thread and none spills (176 registers, compiled for
# sm_90), so two programs still fit.
CONFIGS = {
    (64, 16): LaunchConfig(128, 8, 3, 4),  # *
    (64, 32): LaunchConfig(64, 4, 3, 4),  # *
    (64, 64): LaunchConfig(64, 4, 3, 4),  # +
    (64, 128): LaunchConfig(64, 8, 4, 4),
    (128, 16): LaunchConfig(128, 8, 3, 2),  # *
    (128, 32): LaunchConfig(64, 4, 3, 4),
    (128, 64): LaunchConfig(32, 4, 4, 2),  # +
    (128, 128): LaunchConfig(32, 8, 4, 4),
    (256, 16): LaunchConfig(64, 8, 2, 2),
    (256, 32): LaunchConfig(32, 8, 3, 2),
    (256, 64): LaunchConfig(32, 8, 3, 2),
}
# If a launch has at most this many programs before splitting, half as many parts are better: the best of 28 to 33 on an
# H200, 4 requests of 32k (1 of 128k), fp32 scores, 2026-11-26: (64, 16) 0.077 ms (0.081 before), (128, 16) 0.138
# (0.142). For 16 requests of 32k they are as good as those above (docs/results/h200-draft-sweep.json).
FEW_PROGRAMS = 128
FEW_CONFIGS = {
    (64, 16): LaunchConfig(128, 8, 3, 2),
    (128, 16): LaunchConfig(64, 4, 3, 2),
}
# fp32 is for tests: exact products do not run on tensor cores, and take their operands from registers.
FP32_CONFIG = LaunchConfig(32, 8, 2, 2)


def launch_config(head_size: int, block_m: int, programs: int = FEW_PROGRAMS + 1) -> LaunchConfig:
    """The tuned configuration for 16-bit inputs. programs: requests x KV heads x tiles of query rows."""
    tile = padding.padded(head_size), block_m
    return (FEW_CONFIGS.get(tile) if programs <= FEW_PROGRAMS else None) or CONFIGS[tile]


@checked(contracts.draft_attention)
def draft_attention(
    query, kv_cache, block_table, seq_lens, query_start_loc, scale, out, scored_rows=None, scores=None, lse=None,
    max_query_len=1, requests=None, soft_cap=None, *, config: LaunchConfig | None = None,
) -> None:  # fmt: skip
    """Temporary memory for the parts comes from torch's allocator, under CUDA graph capture from the graph's own pool.
    config: None chooses one by dtype and shapes."""
    tokens, query_heads, size = query.shape
    head_size(size)
    rows = (seq_lens if requests is None else requests).shape[0]
    if rows == 0 or tokens == 0:
        return
    heads, block_size = kv_cache.shape[1:3]
    group = query_heads // heads
    scored_tokens = 1 if lse is None else scored_rows.shape[1]
    tile_rows = group * (max_query_len if out is not None else scored_tokens)
    exact = query.dtype == torch.float32
    most = FP32_MAX_BLOCK_M if exact else MAX_BLOCK_M[padding.padded(size)]
    block_m = min(max(16, triton.next_power_of_2(tile_rows)), most)
    tiles = triton.cdiv(tile_rows, block_m)
    programs = rows * heads * tiles
    config = config or (FP32_CONFIG if exact else launch_config(size, block_m, programs))
    splits = num_splits(programs, block_table.shape[1] * block_size, config, query.device)
    part_lse = part_acc = None
    if splits > 1:
        parts = tokens if out is not None else rows * scored_tokens
        part_lse = torch.empty(parts, query_heads, splits, dtype=torch.float32, device=query.device)
        part_acc = None if out is None else part_lse.new_empty(*part_lse.shape, size)
    # The small product helps only beside a larger tile. With several tiles, each would write the same scores again.
    small_dot = scores is not None and out is not None and block_m > 16 and tiles == 1 and scored_tokens * group <= 16
    shared = {"HEADS": heads, "GROUP": group, "C": scored_tokens, "D": size, "SPLITS": splits}
    tail = (*strides(scored_rows, 1), *strides(out, 2), *strides(lse, 1))
    draft_kernel[(heads * tiles, splits, rows)](
        query, kv_cache, block_table, seq_lens, query_start_loc, requests, scored_rows, scores, out, lse,
        part_acc, part_lse, scale, soft_cap,
        *strides(query, 2), *strides(kv_cache, 3), block_table.stride(0), *strides(scores, 2), *tail,
        BLOCK_SIZE=block_size, TILES=tiles, BLOCK_M=block_m, BLOCK=config.block_n, SMALL_DOT=small_dot, **shared,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits == 1:
        return
    total_rows = query_heads * (max_query_len if out is not None else scored_tokens)
    per_program = min(max(1, COMBINE_ELEMENTS // (splits * padding.padded(size))), triton.next_power_of_2(total_rows))
    combine_tokens[(triton.cdiv(total_rows, per_program), rows)](
        part_acc, part_lse, query_start_loc, requests, scored_rows, out, lse, *tail,
        ROWS=per_program, **shared, num_warps=4,
    )  # fmt: skip

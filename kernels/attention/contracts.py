"""Argument checks of attention. All errors are ``ValueError("<name>: got ..., wanted ...")``."""

from __future__ import annotations

import torch

from ..contracts import FLOATS, expect, group_size, tensor

SCORED_ROWS = (1, 2)  # per request


def draft_attention(
    query, kv_cache, block_table, seq_lens, query_start_loc, out, scored_rows, scores, lse, max_query_len, requests
) -> None:
    tensor("query", query, (None, None, None), FLOATS)
    tokens, query_heads, size = query.shape
    dev = query.device
    tensor("kv_cache", kv_cache, (None, None, None, 2 * size), query.dtype, dev)
    group_size(query_heads, kv_cache.shape[1], "kv_cache")
    tensor("block_table", block_table, (None, None), torch.int32, dev)
    rows = block_table.shape[0]
    tensor("seq_lens", seq_lens, (rows,), torch.int32, dev)
    tensor("query_start_loc", query_start_loc, (rows + 1,), torch.int32, dev)
    some = any(result is not None for result in (out, scores, lse))
    expect(some, "out", "None without scores and lse", "at least one of the three")
    if out is not None:
        tensor("out", out, (tokens, query_heads, size), query.dtype, dev)
    scored = query_heads
    if scored_rows is not None:
        tensor("scored_rows", scored_rows, (rows, None), torch.int64, dev)
        per_request = scored_rows.shape[1]
        expect(per_request in SCORED_ROWS, "scored_rows", f"{per_request} rows per request", "1 or 2")
        scored = per_request * query_heads
    if scores is not None:
        tensor("scores", scores, (rows, scored, None), (torch.float32, torch.bfloat16), dev)
        expect(lse is not None, "lse", None, "a tensor, because scores are asked for")
    if lse is not None:
        tensor("lse", lse, (rows, scored), torch.float32, dev)
        expect(scored_rows is not None, "scored_rows", None, "a tensor, because lse is asked for")
    expect(max_query_len >= 1, "max_query_len", max_query_len, "at least 1")
    if requests is not None:
        tensor("requests", requests, (None,), torch.int64, dev)


def sparse_attention(query, kv_cache, page_table, kept, query_start_loc, out, max_query_len, lse) -> int:
    """Returns the stride between neighbouring heads of the cache, in rows (key and value of one token and head)."""
    tensor("query", query, (None, None, None), FLOATS)
    tokens, query_heads, size = query.shape
    dev = query.device
    tensor("kv_cache", kv_cache, (None, None, None, 2 * size), query.dtype, dev)
    # A dimension of size 1 may have any stride, because the stride is never used.
    dims = zip(kv_cache.shape[:3], kv_cache.stride()[:3], strict=True)
    strides = [0 if count == 1 else stride for count, stride in dims]
    in_rows = all(stride % (2 * size) == 0 for stride in strides)
    expect(in_rows, "kv_cache", f"strides {kv_cache.stride()}", f"multiples of a row of {2 * size}")
    heads = kv_cache.shape[1]
    group_size(query_heads, heads, "kv_cache")
    tensor("page_table", page_table, (None, None, None), torch.int32, dev)
    rows, groups, _ = page_table.shape
    expect(groups in (1, heads), "page_table", f"{groups} groups", f"1 or the {heads} heads of kv_cache")
    tensor("kept", kept, (rows, groups), torch.int32, dev)
    tensor("query_start_loc", query_start_loc, (rows + 1,), torch.int32, dev)
    tensor("out", out, (tokens, query_heads, size), query.dtype, dev)
    expect(max_query_len >= 1, "max_query_len", max_query_len, "at least 1")
    if lse is not None:
        tensor("lse", lse, (tokens, query_heads), torch.float32, dev)
    return strides[1] // (2 * size)

"""Contracts of attention. Requests stand one after another in ``query`` and ``out``."""

from __future__ import annotations

from ..contracts import contract, expect, group_size

SCORED_ROWS = (1, 2)  # per request


@contract(
    """
    query            [T, Hq, D]            floats           D is one of HEAD_SIZES in the kernel
    kv_cache         [any, H, any, 2 * D]  query_or_fp8     [B, H, N, 2D]: key = [..., :D], value = [..., D:]
    block_table      [R, any]              int32            entries past ceil(seq_len / N) are stale and never followed
    seq_lens         [R]                   int32            keys that the last token of the request sees; at most the
        width of the block table and L
    query_start_loc  [R + 1]               int32            q_len may be 0. Rows of ``out`` after the last request stay
        untouched
    scale                                  float            multiplies query . key
    out              [T, Hq, D]            query or None    None if only scores or lse are wanted: no values are read
    scored_rows      [R, C]                int64 or None    a row of the request in ``query``, or -1: its scores and lse
        stay untouched. C is 1 or 2; the two may be one row, whose scores are then written twice
    scores           [R, C * Hq, any]      scores or None   [R, C * Hq, L]
    lse              [R, C * Hq]           float32 or None  natural logarithm; required with scores
    max_query_len                          int              bound of q_len; meant for up to 16; larger is correct but
        reads the keys several times
    requests         [any]                 int64 or None    the requests to work on, each once, -1: none; the outputs of
        all other requests stay untouched. None: all requests. The grid depends on its length
    soft_cap                               float or None    logits l become soft_cap * tanh(l / soft_cap)
    """
)
def draft_attention(query, kv_cache, out, scored_rows, scores, lse, max_query_len) -> None:
    group_size(query.shape[1], kv_cache.shape[1], "kv_cache")
    some = any(result is not None for result in (out, scores, lse))
    expect(some, "out", "None without scores and lse", "at least one of the three")
    if scored_rows is not None:
        per_request = scored_rows.shape[1]
        expect(per_request in SCORED_ROWS, "scored_rows", f"{per_request} rows per request", "1 or 2")
    expect(scores is None or lse is not None, "lse", None, "a tensor, because scores are asked for")
    expect(lse is None or scored_rows is not None, "scored_rows", None, "a tensor, because lse is asked for")
    expect(max_query_len >= 1, "max_query_len", max_query_len, "at least 1")


@contract(
    """
    query            [T, Hq, D]            floats           D is one of HEAD_SIZES in the kernel
    kv_cache         [any, H, any, 2 * D]  query_or_fp8     [B, H, N, 2D]: key = [..., :D], value = [..., D:]; strides
        are multiples of 2D
    page_table       [R, G, any]           int32            G is 1 or H; entries past kept are undefined, never followed
    kept             [R, G]                int32            0 or less: (request, group) is left to another executor
    query_start_loc  [R + 1]               int32            q_len may be 0
    scale                                  float            multiplies query . key
    out              [T, Hq, D]            query            rows of a (request, head) with kept <= 0 stay untouched. A
        token that sees no entry, which no valid table has, gets 0
    max_query_len                          int              bound of q_len; meant for up to about 16; larger is correct
        but slow
    lse              [T, Hq]               float32 or None  natural logarithm; -inf for a token that sees no entry
    soft_cap                               float or None    logits l become soft_cap * tanh(l / soft_cap)
    """
)
def sparse_attention(query, kv_cache, page_table, kept, query_start_loc, out, max_query_len, lse) -> None:
    row, heads, groups = kv_cache.shape[3], kv_cache.shape[1], page_table.shape[1]
    # A dimension of size 1 may have any stride, because the stride is never used.
    dims = zip(kv_cache.shape[:3], kv_cache.stride()[:3], strict=True)
    in_rows = all(count == 1 or stride % row == 0 for count, stride in dims)
    expect(in_rows, "kv_cache", f"strides {kv_cache.stride()}", f"multiples of a row of {row}")
    group_size(query.shape[1], heads, "kv_cache")
    expect(groups in (1, heads), "page_table", f"{groups} groups", f"1 or the {heads} heads of kv_cache")
    expect(max_query_len >= 1, "max_query_len", max_query_len, "at least 1")


@contract(
    """
    query            [T, Hq, D]            floats
    out              [T, Hq, D]            query         rows of a request with seq_len 0 stay untouched
    kv_cache         [any, H, any, 2 * D]  query_or_fp8  [B, H, N, 2D]
    block_table      [R, any]              int32
    seq_lens         [R]                   int32         the new tokens included
    query_start_loc  [R + 1]               int32
    sinks            [Hq]                  floats or None  a logit of each query head; see ``sinks.py``
    soft_cap                               float or None   logits l become soft_cap * tanh(l / soft_cap)
    """
)
def dense_attention(query, kv_cache) -> None:
    group_size(query.shape[1], kv_cache.shape[1], "kv_cache")

"""Contracts of the guarantee's operations, and the sample's arithmetic, which kernels and references share.

Of each KV head, m of the unread tokens are drawn, with replacement. The probability of token j is w_j / W, where W is
the sum of w over the unread tokens, and

    w_j = v(bin_j) + u        v(b) = round(64 exp(3/4 b / 12.75))        u = max(1, V / (10 n))

bin_j is the score that the search gave to the token, V the sum of v over the n unread tokens. So a token that the
sketch thinks is heavy is drawn often, and every token can be drawn: the exponent 3/4 and u are for those that the
sketch underestimates. All of this is in integers, so that the sums of chunks agree with the sum of all to the last
digit, and each draw falls on one token.

The draws are stratified: draw i is for the i-th of m equal parts of W, at a point that a hash of length, layer, head
and i chooses. A step that runs again draws the same.
"""

from __future__ import annotations

import functools

import torch

from ..contracts import Contract, contract, expect, group_size
from ..sketch.contracts import BINS, PER_NAT

UNIFORM_PART = 10
"""The uniform part of the draws is one in this many."""
TEMPERATURE = 0.75
"""On SmolLM2, of the rows that lose more than epsilon, 0.8 to 1.0% are not noticed (delta = 0.05, 64 draws). With 1 it
is 1.4 to 1.9%, with 0.5 up to 2.1%, and with uniform draws up to 4.4% (docs/trust.md)."""
JITTER_BITS = 20


@functools.cache
def weight_table(device: torch.device, temperature: float = TEMPERATURE) -> torch.Tensor:
    """v(b) of each bin [256] int64. temperature: the exponent of the estimated weights."""
    exact = torch.exp(torch.arange(BINS, dtype=torch.float64) / PER_NAT * temperature) * 64
    return exact.round().long().to(device)


sample_unread = Contract(
    """
    scores           [R, H, any]     uint8    of the context, from ``score_tokens``
    histogram        [R, H, 256]     int32    from ``score_tokens``
    chunks           [R, H, C, 256]  int16    from ``score_tokens``
    cuts             [R, H, 2]       int32    from ``cut_scores``; threshold -1: nothing is unread
    starts           [R, H, C, 2]    int32    from ``cut_scores``
    query_start_loc  [R + 1]         int32
    seq_lens         [R]             int32    the step's own tokens included; 0 = padded row
    sink, recent                     int      as in ``score_tokens``
    layer                            int      the layer's number, for the draws
    positions        [R, H, M]       int32    written: M drawn positions of unread tokens; -1 if there are none
    worth            [R, H, M]       float32  written where there is a position: 1 / its probability in one draw
    """
)


@contract(
    """
    query            [T, Hq, D]     floats
    kv_cache         [B, H, N, 2 * D]  query_or_fp8
    block_table      [R, any]       int32
    query_start_loc  [R + 1]        int32
    positions        [R, H, M]      int32    from ``sample_unread``
    worth            [R, H, M]      float32
    lse              [>= T, Hq]     float32  logsumexp of the logits of the tokens that were read, of each query row
    scale            float                   multiplies query . key
    quantile         float                   of the normal distribution, for the confidence
    max_query_len    int                     most tokens of a row
    lost             [R, H]         float32  written: the largest upper bound on a row's share of unread mass; 1 if it
        is no number, 0 if nothing is unread
    """
)
def bound_lost(query, kv_cache, max_query_len, positions) -> None:
    group_size(query.shape[1], kv_cache.shape[1], "kv_cache")
    expect(max_query_len > 0, "max_query_len", max_query_len, "at least 1")
    samples = positions.shape[2]
    expect(samples >= 16 and samples & (samples - 1) == 0, "positions", f"{samples} draws", "a power of two from 16 on")

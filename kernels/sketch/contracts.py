"""Contracts of the sketch's operations, and what kernels, references and callers of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..contracts import FP8, HEAD_SIZES, Contract, contract, expect, group_size

BINS = 256
LOWEST, PER_NAT = -16.0, 12.75
"""A score s in nats is stored as the bin floor((s - LOWEST) * PER_NAT), 0 to 255: from -16 to 4, in steps of 0.078."""
MAX_SAMPLE = 512
"""Most tokens from which the normaliser of a query row is estimated, besides the last 16 to 31."""
CHUNK = 2048
"""Tokens of the context that one program scans."""
SAMPLE_BLOCK = 16
"""Neighbouring tokens that are sampled together. The size of a block of vLLM's cache is a multiple of it."""
TOTALS = BINS + 2
"""Integers kept from a request's step: tokens by bin, the number of their heads, and tokens taken beyond the share."""


def sampled_tokens(context: torch.Tensor) -> torch.Tensor:
    """The number of tokens from which the normalisers of a row are estimated, for contexts [R], integers: the last 16
    to 31 tokens, and blocks at equal distances before them, at most MAX_SAMPLE tokens."""
    stride = ((context + MAX_SAMPLE - 1) // MAX_SAMPLE).clamp(min=1)
    blocks = (context - SAMPLE_BLOCK).clamp(min=0) // SAMPLE_BLOCK
    return context - blocks * SAMPLE_BLOCK + (blocks + stride - 1) // stride * SAMPLE_BLOCK


@dataclass(frozen=True)
class Budget:
    """How many tokens of the context each KV head reads. Counts are in tokens and include the forced ones.

    The context is the tokens that a row had before this step; the step's own tokens are always read. The first ``sink``
    and the last ``recent`` tokens of the context are *forced*: always read. With top_p None, the budget is ``ratio`` of
    the context. ``shared`` says which KV heads share it, those of one layer or of all layers: their mean is the budget,
    and each head gets more or less by its scores, but at least ``min_tokens``. 'none': each head gets the same. With
    top_p, a head gets the fewest tokens that hold ``top_p`` of its estimated attention, at most ``ratio`` of the
    context.
    """

    ratio: float
    top_p: float | None = None
    shared: Literal["layers", "heads", "none"] = "heads"
    min_tokens: int = 128
    max_tokens: int = -1
    """-1: no limit."""
    sink: int = 4
    recent: int = 64

    @property
    def fixed_ratio(self) -> int:
        """The ratio in units of 1 / 65536."""
        return round(self.ratio * 65536)

    @property
    def amount(self) -> str:
        """The budget in words."""
        return f"{self.ratio:.1%} of the context" if self.top_p is None else f"top_p={self.top_p} of what is estimated"

    @property
    def dense_up_to(self) -> int:
        """Contexts of up to this many tokens are dense, without a search."""
        if self.ratio >= 1 and self.top_p is None and self.max_tokens < 0:
            return 2**31 - 1
        return min(max(self.min_tokens, self.sink + self.recent), 2**31 - 1)


@contract(
    """
    key           [T, H, D]         floats       D is one of HEAD_SIZES
    slot_mapping  [S]               int64        S <= T; block * N + offset of each key in the cache, negative: not
        written
    rotation      [D, D]            key          +1 and -1: a key k becomes k @ rotation / sqrt(D)
    centre        [H, D]            float32      rotated
    codes         [B, H, N, any]    uint8        written; [B, H, N, C], C = D * bits / 8, order of the elements as in
        ``layout``
    scales        [B, H, N]         float16      written: k.k / k.level, the value of one unit of a level
    value         [T, H, D]         key or None  None: only codes are written. One launch for codes, keys and values
        takes as long as vLLM's cache write alone
    kv_cache      [B, H, N, 2 * D]  key_or_fp8 or None  written; only with value. With fp8, codes are those of the
        keys as they are in the cache: divided by their scale, and rounded
    key_scale, value_scale          float        of an fp8 cache: what 1 in it is worth
    """
)
def encode_keys(key, slot_mapping, value, kv_cache, key_scale, value_scale) -> None:
    expect(key.shape[2] in HEAD_SIZES, "key", f"head size {key.shape[2]}", f"one of {HEAD_SIZES}")
    expect(slot_mapping.shape[0] <= key.shape[0], "slot_mapping", slot_mapping.shape[0], "no more than the keys")
    expect((value is None) == (kv_cache is None), "kv_cache", "given or not", "as value is")
    scaled = (key_scale, value_scale) != (1.0, 1.0)
    expect(not scaled or (kv_cache is not None and kv_cache.dtype == FP8), "key_scale", key_scale, "1 without fp8")


@contract(
    """
    query            [T, Hq, D]      floats
    seq_lens         [R]             int32    the step's own tokens included
    query_start_loc  [R + 1]         int32
    dense            [R]             int32    not 0: the row is dense, and nothing is computed for it
    block_table      [R, any]        int32
    valid_lens       [R]             int32    how many of the row's tokens, from its first, have queries that count; the
        last ones do not if they are rejected drafts
    codes            [B, H, N, any]  uint8    as in ``encode_keys``
    scales           [B, H, N]       float16
    rotation         [D, D]          query
    scale                            float    multiplies query . key
    max_query_len                    int      most tokens of a row
    dense_up_to                      int      contexts of up to this many tokens are dense
    packed           [R, H, M, D]    int8     written
    factors          [R, H, 3, M]    float32  written: a, b and n; 0, 0 and infinity for padding rows
    histogram        [R, H, 256]     int32    set to zero, also for dense rows
    """
)
def prepare_queries(query, codes, max_query_len, packed) -> None:
    rows = group_size(query.shape[1], codes.shape[1], "codes") * max_query_len
    tokens = codes.shape[2]
    expect(tokens % SAMPLE_BLOCK == 0, "codes", f"blocks of {tokens}", f"a multiple of {SAMPLE_BLOCK} tokens")
    expect(packed.shape[2] >= rows, "packed", f"{packed.shape[2]} rows", f"{rows}")


score_tokens = Contract(
    """
    packed           [R, H, M, D]                int8     from ``prepare_queries``
    factors          [R, H, 3, M]                float32  from ``prepare_queries``
    seq_lens         [R]                         int32    the step's own tokens included
    query_start_loc  [R + 1]                     int32
    dense            [R]                         int32    not 0: nothing is scanned for the row
    block_table      [R, any]                    int32
    codes            [B, H, N, any]              uint8    as in ``encode_keys``
    scales           [B, H, N]                   float16
    sink, recent                                 int      number of forced tokens at both ends of the context, which are
        not in the histograms
    dense_up_to                                  int      contexts of up to this many tokens are dense
    scores           [R, H, L]                   uint8    written: bin of each token of the context; NaN scores get 255
    histogram        [R, H, 256]                 int32    must be zero before: number of free tokens of the context by
        bin
    chunks           [R, H, -(-L // 2048), 256]  int16    written: the same for each chunk with a part of the context
    """
)


carry_thresholds = Contract(
    """
    seq_lens         [R]       int32  the step's own tokens included; 0 = padded row
    query_start_loc  [R + 1]   int32
    slots            [R]       int32  request slot of each row; negative: a padded row. Padded rows share the last slot
    totals           [S, 258]  int32  by slot: free tokens of the last step by bin, summed over the layers; the number
        of their heads; and how many tokens these heads took beyond their share by the threshold. Zeros for a new
        request. Set to zero
    thresholds       [S, 2]    int32  by slot, written: (bin, part): tokens in higher bins are taken, and part / 65536
        of the tokens in this bin; bin -1: no threshold yet
    """
)


cut_scores = Contract(
    """
    histogram        [R, H, 256]     int32  number of free tokens of the context by bin
    chunks           [R, H, C, 256]  int16  the same for each chunk of 2,048 tokens
    seq_lens         [R]             int32  the step's own tokens included; 0 = padded row
    query_start_loc  [R + 1]         int32
    dense            [R]             int32  not 0: every token is read, as in rows whose budget is the whole context
    scores           [R, H, any]     uint8  [R, H, L], only read with ``top_p``, for the weight of the forced tokens
    slots            [R]             int32  as in ``carry_thresholds``
    totals           [S, 258]        int32  the same, of the layers so far; updated if layers share
    thresholds       [S, 2]          int32
    cuts             [R, H, 2]       int32  written: (threshold, skip): free tokens in bins above the threshold are
        read, and those in its bin but the first ``skip``; threshold -1: all
    starts           [R, H, C, 2]    int32  written if the threshold is not -1, for each chunk with a part of the
        context: free tokens above the threshold, and in its bin, in the chunks before it
    """
)


@contract(
    """
    scores           [R, H, any]     uint8  [R, H, L], of the context
    cuts             [R, H, 2]       int32  from ``cut_scores``
    starts           [R, H, any, 2]  int32  from ``cut_scores``
    seq_lens         [R]             int32  the step's own tokens included, at most L; 0 = padded row: kept = 0
    query_start_loc  [R + 1]         int32
    block_table      [R, any]        int32
    page_strides                            strides between blocks, heads and tokens of the cache, in rows of 2D
        elements
    sink, recent                     int    as in ``score_tokens``
    ahead                            int    number of tokens after the step's own whose pages are also written, after
        the kept ones: later steps read the same table and more of it
    page_table       [R, H, any]     int32  written: ids of the pages to read, one per token and head, in ascending
        position; entries past kept + ahead stay untouched, and nothing is written past its width. It may be narrower
        than L if the cuts never keep more
    kept             [R, H]          int32  written: number of pages to read, without the ``ahead`` ones
    """
)
def list_pages(block_size, page_strides, ahead) -> None:
    expect(block_size > 0, "block_size", block_size, "at least 1")
    expect(ahead >= 0, "ahead", ahead, "0 or more")
    expect(len(page_strides) == 3, "page_strides", page_strides, "(block, head, token)")

"""Argument checks of the sketch's operations, for kernels and references, with the helpers of ``../contracts.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..contracts import FLOATS, expect, group_size, tensor
from .layout import BITS

HEAD_SIZES = (64, 128, 256)
BINS = 256
LOWEST, PER_NAT = -16.0, 12.75
"""A score s in nats is stored as the bin floor((s - LOWEST) * PER_NAT), 0 to 255: from -16 to 4, in steps of 0.078."""
MAX_SAMPLE = 512
"""Most tokens from which the normaliser of a query row is estimated, besides the last 16 to 31."""
CHUNK = 2048
"""Tokens of the context that one program scans."""
SAMPLE_BLOCK = 16
"""Neighbouring tokens that are sampled together. The size of a block of vLLM's cache is a multiple of it."""


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


def views(kv_cache_device, codes, scales) -> tuple[int, int, int, int]:
    """Checks codes and scales; returns (heads, block size, code bytes, blocks)."""
    tensor("codes", codes, (None, None, None, None), torch.uint8, kv_cache_device)
    blocks, heads, tokens, code_bytes = codes.shape
    tensor("scales", scales, (blocks, heads, tokens), torch.float16, kv_cache_device)
    return heads, tokens, code_bytes, blocks


def bits_of(code_bytes: int, head_size: int) -> int:
    bits = code_bytes * 8 // head_size
    expect(bits in BITS and bits * head_size == code_bytes * 8, "codes", f"{code_bytes} bytes", "1, 2 or 4 bits a key")
    return bits


def encode_keys(key, slot_mapping, rotation, centre, codes, scales, value=None, kv_cache=None) -> int:
    """Returns the bits of a code."""
    tensor("key", key, (None, None, None), FLOATS)
    _, heads, size = key.shape
    dev = key.device
    expect(size in HEAD_SIZES, "key", f"head size {size}", f"one of {HEAD_SIZES}")
    expect(views(dev, codes, scales)[0] == heads, "codes", f"{codes.shape[1]} heads", f"the {heads} of key")
    tensor("slot_mapping", slot_mapping, (None,), torch.int64, dev)
    expect(slot_mapping.shape[0] <= key.shape[0], "slot_mapping", slot_mapping.shape[0], "no more than the keys")
    tensor("rotation", rotation, (size, size), key.dtype, dev)
    tensor("centre", centre, (heads, size), torch.float32, dev)
    expect((value is None) == (kv_cache is None), "kv_cache", "given or not", "as value is")
    if value is not None:
        tensor("value", value, key.shape, key.dtype, dev)
        tensor("kv_cache", kv_cache, (*codes.shape[:3], 2 * size), key.dtype, dev)
    return bits_of(codes.shape[3], size)


def _rows(query_start_loc, seq_lens, dense, block_table, dev) -> int:
    tensor("seq_lens", seq_lens, (None,), torch.int32, dev)
    rows = seq_lens.shape[0]
    tensor("query_start_loc", query_start_loc, (rows + 1,), torch.int32, dev)
    tensor("dense", dense, (rows,), torch.int32, dev)
    tensor("block_table", block_table, (rows, None), torch.int32, dev)
    return rows


def prepare_queries(
    query, query_start_loc, seq_lens, dense, valid_lens, block_table, codes, scales, rotation, max_query_len, packed,
    factors, histogram,
) -> tuple[int, int]:  # fmt: skip
    """Returns the query heads of a KV head and the bits of a code."""
    tensor("query", query, (None, None, None), FLOATS)
    dev, size = query.device, query.shape[2]
    rows = _rows(query_start_loc, seq_lens, dense, block_table, dev)
    tensor("valid_lens", valid_lens, (rows,), torch.int32, dev)
    heads, block_size, code_bytes, _ = views(dev, codes, scales)
    group = group_size(query.shape[1], heads, "codes")
    expect(block_size % SAMPLE_BLOCK == 0, "codes", f"blocks of {block_size}", f"a multiple of {SAMPLE_BLOCK} tokens")
    tensor("rotation", rotation, (size, size), query.dtype, dev)
    tensor("packed", packed, (rows, heads, None, size), torch.int8, dev)
    expect(packed.shape[2] >= max_query_len * group, "packed", f"{packed.shape[2]} rows", f"{max_query_len * group}")
    tensor("factors", factors, (rows, heads, 3, packed.shape[2]), torch.float32, dev)
    tensor("histogram", histogram, (rows, heads, BINS), torch.int32, dev)
    return group, bits_of(code_bytes, size)


def score_tokens(
    packed, factors, query_start_loc, seq_lens, dense, block_table, codes, scales, scores, histogram, chunks
) -> int:
    """Returns the bits of a code."""
    tensor("packed", packed, (None, None, None, None), torch.int8)
    rows, heads, width, size = packed.shape
    dev = packed.device
    expect(_rows(query_start_loc, seq_lens, dense, block_table, dev) == rows, "packed", rows, "as many as seq_lens")
    code_bytes = views(dev, codes, scales)[2]
    tensor("factors", factors, (rows, heads, 3, width), torch.float32, dev)
    tensor("scores", scores, (rows, heads, None), torch.uint8, dev)
    tensor("histogram", histogram, (rows, heads, BINS), torch.int32, dev)
    tensor("chunks", chunks, (rows, heads, -(-scores.shape[2] // CHUNK), BINS), torch.int16, dev)
    return bits_of(code_bytes, size)


TOTALS = BINS + 2
"""Integers kept from a request's step: tokens by bin, the number of their heads, and tokens taken beyond the share."""


def _carried(slots, totals, thresholds, rows, dev) -> None:
    tensor("slots", slots, (rows,), torch.int32, dev)
    tensor("totals", totals, (None, TOTALS), torch.int32, dev)
    tensor("thresholds", thresholds, (totals.shape[0], 2), torch.int32, dev)


def carry_thresholds(query_start_loc, seq_lens, slots, totals, thresholds) -> None:
    tensor("seq_lens", seq_lens, (None,), torch.int32)
    rows, dev = seq_lens.shape[0], seq_lens.device
    tensor("query_start_loc", query_start_loc, (rows + 1,), torch.int32, dev)
    _carried(slots, totals, thresholds, rows, dev)


def cut_scores(
    histogram, chunks, query_start_loc, seq_lens, dense, cuts, starts, scores, slots, totals, thresholds
) -> None:
    tensor("histogram", histogram, (None, None, BINS), torch.int32)
    rows, heads, _ = histogram.shape
    _carried(slots, totals, thresholds, rows, histogram.device)
    dev = histogram.device
    tensor("chunks", chunks, (rows, heads, None, BINS), torch.int16, dev)
    tensor("query_start_loc", query_start_loc, (rows + 1,), torch.int32, dev)
    tensor("seq_lens", seq_lens, (rows,), torch.int32, dev)
    tensor("dense", dense, (rows,), torch.int32, dev)
    tensor("cuts", cuts, (rows, heads, 2), torch.int32, dev)
    tensor("starts", starts, (rows, heads, chunks.shape[2], 2), torch.int32, dev)
    tensor("scores", scores, (rows, heads, None), torch.uint8, dev)


def list_pages(
    scores, cuts, starts, query_start_loc, seq_lens, block_table, block_size, page_strides, ahead, page_table, kept
) -> None:
    tensor("scores", scores, (None, None, None), torch.uint8)
    rows, heads, _ = scores.shape
    dev = scores.device
    tensor("cuts", cuts, (rows, heads, 2), torch.int32, dev)
    tensor("starts", starts, (rows, heads, None, 2), torch.int32, dev)
    expect(_rows(query_start_loc, seq_lens, seq_lens, block_table, dev) == rows, "scores", rows, "as many as seq_lens")
    tensor("page_table", page_table, (rows, heads, None), torch.int32, dev)
    tensor("kept", kept, (rows, heads), torch.int32, dev)
    expect(block_size > 0, "block_size", block_size, "at least 1")
    expect(ahead >= 0, "ahead", ahead, "0 or more")
    expect(len(page_strides) == 3, "page_strides", page_strides, "(block, head, token)")

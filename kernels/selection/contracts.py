"""Argument checks of the selection operations. All errors are ``ValueError("<name>: got ..., wanted ...")``."""

from __future__ import annotations

import torch

from ..contracts import expect, group_size, tensor

MAX_DILATION = 64
COMBINE = ("store", "add")


def accumulate_mass(scores, lse, lens, mass, combine) -> None:
    tensor("scores", scores, (None, None, None), (torch.float32, torch.bfloat16))
    rows, query_heads, width = scores.shape
    dev = scores.device
    tensor("lse", lse, (rows, query_heads), torch.float32, dev)
    tensor("lens", lens, (rows,), torch.int32, dev)
    tensor("mass", mass, (rows, None, width), torch.float32, dev)
    group_size(query_heads, mass.shape[1], "mass")
    expect(combine in COMBINE, "combine", repr(combine), " or ".join(COMBINE))


def select_top_p(mass, lens, bits, counts, top_p, min_tokens, max_tokens, max_fraction, sink, recent) -> None:
    tensor("mass", mass, (None, None), torch.float32)
    rows, width = mass.shape
    tensor("lens", lens, (rows,), torch.int32, mass.device)
    tensor("bits", bits, (rows, -(-width // 32)), torch.int32, mass.device)
    tensor("counts", counts, (rows,), torch.int32, mass.device)
    expect(top_p >= 0, "top_p", top_p, "at least 0")
    expect(0 <= max_fraction <= 1, "max_fraction", max_fraction, "0 to 1")
    expect(max_tokens >= -1, "max_tokens", max_tokens, "at least 0, or -1 for no limit")
    for name, value in (("min_tokens", min_tokens), ("sink", sink), ("recent", recent)):
        expect(0 <= value < 2**31, name, value, "0 or more, below 2^31")


def dilate_mass(mass, lens, out, steps, weight) -> None:
    tensor("mass", mass, (None, None), torch.float32)
    tensor("lens", lens, (mass.shape[0],), torch.int32, mass.device)
    tensor("out", out, tuple(mass.shape), torch.float32, mass.device)
    expect(not _overlap(mass, out), "out", "memory of mass", "memory of its own")
    expect(0 <= steps <= MAX_DILATION, "steps", steps, f"0 to {MAX_DILATION}")
    expect(weight > 0, "weight", weight, "more than 0")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the memory ranges of two tensors, from their first to their last element, overlap."""
    if not a.numel() or not b.numel():
        return False
    spans = ((t.data_ptr(), sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) for t in (a, b))
    (first, n), (second, m) = spans
    return first < second + m * b.element_size() and second < first + n * a.element_size()


def build_page_tables(
    bits, slots, prefix_lens, seq_lens, block_table, block_size, page_strides, page_table, kept, sources, groups
) -> None:
    tensor("bits", bits, (None, None, None, None), torch.int32)
    tables, _, heads, _ = bits.shape
    dev = bits.device
    expect((sources is None) == (groups is None), "groups", type(groups).__name__, "given with sources, or neither")
    if sources is not None:
        expect(min(bits.shape[0], heads) > 0, "bits", f"shape {tuple(bits.shape)}", "a source and a group to map to")
        tensor("sources", sources, (None,), torch.int32, dev)
        tensor("groups", groups, (sources.shape[0], None), torch.int32, dev)
        tables, heads = groups.shape
    tensor("slots", slots, (None,), torch.int64, dev)
    rows = slots.shape[0]
    tensor("prefix_lens", prefix_lens, (rows,), torch.int32, dev)
    tensor("seq_lens", seq_lens, (rows,), torch.int32, dev)
    tensor("block_table", block_table, (rows, None), torch.int32, dev)
    tensor("page_table", page_table, (tables, rows, heads, None), torch.int32, dev)
    tensor("kept", kept, (tables, rows, heads), torch.int32, dev)
    expect(block_size > 0, "block_size", block_size, "at least 1")
    expect(len(page_strides) == 3, "page_strides", page_strides, "(block, head, token)")


def build_block_tables(
    bits, slots, prefix_lens, seq_lens, block_table, block_size, page_table, kept, sources, groups
) -> None:
    for name, value in (("sources", sources), ("groups", groups)):
        expect(value is None, name, "a map", "None, because a block holds all heads")
    tensor("bits", bits, (None, None, None, None), torch.int32)
    tables, _, shared, _ = bits.shape
    dev = bits.device
    expect(shared == 1, "bits", f"{shared} score groups", "1, because a block holds all heads")
    tensor("slots", slots, (None,), torch.int64, dev)
    rows = slots.shape[0]
    tensor("prefix_lens", prefix_lens, (rows,), torch.int32, dev)
    tensor("seq_lens", seq_lens, (rows,), torch.int32, dev)
    tensor("block_table", block_table, (rows, None), torch.int32, dev)
    tensor("page_table", page_table, (tables, rows, 1, None), torch.int32, dev)
    tensor("kept", kept, (tables, rows, 1), torch.int32, dev)
    expect(block_size > 0, "block_size", block_size, "at least 1")


def mark_rows(query_start_loc, seq_lens, max_query_len, scored_rows, lens) -> None:
    tensor("seq_lens", seq_lens, (None,), torch.int32)
    rows, dev = seq_lens.shape[0], seq_lens.device
    tensor("query_start_loc", query_start_loc, (rows + 1,), torch.int32, dev)
    tensor("lens", lens, (None,), torch.int32, dev)
    expect(lens.shape[0] >= rows, "lens", f"{lens.shape[0]} elements", f"the {rows} rows or more")
    tensor("scored_rows", scored_rows, (lens.shape[0], 2), torch.int64, dev)
    expect(scored_rows.is_contiguous(), "scored_rows", f"strides {scored_rows.stride()}", "contiguous rows")
    expect(max_query_len >= 1, "max_query_len", max_query_len, "at least 1")

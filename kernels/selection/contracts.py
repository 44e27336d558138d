"""Contracts of the selection's operations."""

from __future__ import annotations

import torch

from ..contracts import contract, expect, group_size

MAX_DILATION = 64
COMBINE = ("store", "add")


@contract(
    """
    scores   [R, Hq, L]   scores   scaled logits as ``draft_attention`` stores them; with two scored rows, Hq here is
        twice the number of query heads, and the rows of a KV head are consecutive
    lse      [R, Hq]      float32  natural logarithm, finite wherever lens > 0
    lens     [R]          int32    at most the seq_len of the scores; 0 = padded row, which stays untouched
    mass     [R, any, L]  float32  [R, G, L], in and out; G divides Hq, and the heads of a group are consecutive;
        positions from lens on stay untouched
    weight                float    on the host
    combine                        "store" or "add"
    """
)
def accumulate_mass(scores, mass, combine) -> None:
    group_size(scores.shape[1], mass.shape[1], "mass")
    expect(combine in COMBINE, "combine", repr(combine), " or ".join(COMBINE))


@contract(
    """
    mass        [X, L]            float32  0 or more; the sum of a row is at most 1, give or take rounding (sums are
        kept in int32, which holds up to 2)
    lens        [X]               int32    at most L; 0 = padded row: no bit set, count 0
    bits        [X, -(-L // 32)]  int32    token p is bit p % 32 of word p // 32; every word of a row is written, and is
        zero past len
    counts      [X]               int32    number of bits set in the row
    max_tokens                             -1 = no limit
    union                                  OR the selection into ``bits``; ``counts`` is then that of the union
    """
)
def select_top_p(top_p, min_tokens, max_tokens, max_fraction, sink, recent) -> None:
    expect(top_p >= 0, "top_p", top_p, "at least 0")
    expect(0 <= max_fraction <= 1, "max_fraction", max_fraction, "0 to 1")
    expect(max_tokens >= -1, "max_tokens", max_tokens, "at least 0, or -1 for no limit")
    for name, value in (("min_tokens", min_tokens), ("sink", sink), ("recent", recent)):
        expect(0 <= value < 2**31, name, value, "0 or more, below 2^31")


@contract(
    """
    mass    [X, L]  float32  nonnegative; positions from lens on are never read
    lens    [X]     int32    at most L; 0 = padded row, which stays untouched
    out     [X, L]  float32  must not share memory with ``mass``; positions from lens on stay untouched
    steps           int      on the host, 0 to 64: every step reads the row once more, mostly from the L1 cache
    weight          float    on the host, positive. A maximum over steps + 1 positions is at most their sum, so the
        row's sum grows at most (steps + 1)-fold. With a weight of 1 / (steps + 1) or less, sums of at most 1 stay at
        most 1, as ``select_top_p`` requires
    """
)
def dilate_mass(mass, out, steps, weight) -> None:
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


@contract(
    """
    bits         [any, any, any, any]  int32          [S, slots, G, W], as ``select_top_p`` writes them; without maps G
        is 1 (shared by all heads) or H; with maps any number
    sources      [T]                   int32 or None  0 to S-1: the source of each table
    groups       [T, H]                int32 or None  0 to G-1: the group of each table and head; with sources only
    slots        [R]                   int64          row of ``bits`` of each request; -1 = padded row: only kept = 0 is
        written
    prefix_lens  [R]                   int32          -1 = no selection, keep everything. Positions from 32 * W on have
        no bit, and are kept as if the prefix ended there
    seq_lens     [R]                   int32          0 = padded row: kept = 0
    block_table  [R, any]              int32          entries past ceil(seq_len / N) are stale and never read
    page_table   [T, R, H, any]        int32          at least max(seq_lens) wide; pages in ascending position; entries
        past kept stay untouched, and nothing is written past the width. Without maps, T is S and H is G
    kept         [T, R, H]             int32          number of pages
    """
)
def build_page_tables(bits, block_size, page_strides, page_table, sources, groups) -> None:
    expect((sources is None) == (groups is None), "groups", type(groups).__name__, "given with sources, or neither")
    found, of_bits = tuple(page_table.shape), (bits.shape[0], bits.shape[2])
    if sources is None:
        expect(found[::2] == of_bits, "page_table", f"shape {found}", f"{of_bits} sources and groups, as bits")
    else:
        expect(min(of_bits) > 0, "bits", f"shape {tuple(bits.shape)}", "a source and a group to map to")
    expect(block_size > 0, "block_size", block_size, "at least 1")
    expect(len(page_strides) == 3, "page_strides", page_strides, "(block, head, token)")


@contract(
    """
    bits         [S, any, any, any]  int32  [S, slots, 1, W], as ``select_top_p`` writes them; shared by all heads
    slots        [R]                 int64  row of ``bits`` of each request; -1 = padded row: only kept = 0 is written
    prefix_lens  [R]                 int32  as in ``build_page_tables``
    seq_lens     [R]                 int32  0 = padded row: kept = 0
    block_table  [R, any]            int32  covers max(seq_lens); entries past ceil(seq_len / N) are stale, never read
    page_table   [S, R, 1, any]      int32  at least ceil(max(seq_lens) / N) wide; entries past the kept blocks stay
        untouched, and nothing is written past the width
    kept         [S, R, 1]           int32  number of tokens in the blocks
    """
)
def build_block_tables(bits, block_size, sources, groups) -> None:
    for name, value in (("sources", sources), ("groups", groups)):
        expect(value is None, name, "a map", "None, because a block holds all heads")
    shared = bits.shape[2]
    expect(shared == 1, "bits", f"{shared} score groups", "1, because a block holds all heads")
    expect(block_size > 0, "block_size", block_size, "at least 1")


@contract(
    """
    seq_lens         [R]      int32  the step's own tokens included; 0 = padded row
    query_start_loc  [R + 1]  int32
    max_query_len             int    most tokens of a verification
    lens             [M]      int32  written, M >= R: number of positions to rank, up to the first row's own token (for
        a prompt, its last row's own token); newer tokens may be rejected. 0 for padded rows and from R on
    scored_rows      [M, 2]   int64  written, contiguous: rows of the query for ``draft_attention``; -1 for padded rows
        and from R on
    """
)
def mark_rows(seq_lens, max_query_len, scored_rows, lens) -> None:
    rows, found = seq_lens.shape[0], lens.shape[0]
    expect(found >= rows, "lens", f"{found} elements", f"the {rows} rows or more")
    expect(scored_rows.is_contiguous(), "scored_rows", f"strides {scored_rows.stride()}", "contiguous rows")
    expect(max_query_len >= 1, "max_query_len", max_query_len, "at least 1")

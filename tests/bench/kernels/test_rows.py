"""Rows of `specattn bench kernels`: the bytes that have to move, and calls that do what engines do."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.bench.kernels import rows
from specattn_vllm.bench.kernels.rows import ROWS
from specattn_vllm.bench.kernels.sketch import Search
from specattn_vllm.kernels import reference
from specattn_vllm.kernels.sketch import contracts

NAMED = {row.name: row for row in ROWS}
# The demo pair's target and draft: 4 query and 2 KV heads of 64; the draft has 3 layers. In fp32, on a CPU.
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are those of fp32")


def test_what_rows_are_compared_with_stands_before_them():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for place, row in enumerate(ROWS):
        assert row.against is None or row.against in names[:place]


@on_cpu
def test_bytes(setup):
    it = setup("2x100", 0.1)
    queries, entry = 2 * 2 * 6 * 4 * 64 * 4, 2 * 2 * 2 * 64 * 4
    assert rows.dense(it, "target", 6).nbytes == 100 * entry + queries + 2 * 7 * 4
    # A table of 10 ids and a count for each request, or for each of its heads.
    assert NAMED["sparse shared"].make(it).nbytes == 10 * entry + queries + 2 * 11 * 4
    assert NAMED["sparse per-head"].make(it).nbytes == 10 * entry + queries + 2 * 2 * 11 * 4
    scores = 2 * 4 * (100 * 2 + 4)
    assert NAMED["draft scores"].make(it).nbytes - NAMED["draft dense"].make(it).nbytes == scores
    # Of 94 tokens: 16 bytes of codes and a scale of 2 in, a byte of score out; histograms of it and of one chunk.
    packed, histograms = 2 * 2 * 16 * (64 + 12), 2 * 2 * (contracts.BINS * 4 + contracts.BINS * 2)
    assert NAMED["sketch scan"].make(it).nbytes == 2 * 2 * 94 * 19 + packed + histograms + 2 * 7 * 4


def test_attention_over_a_selection_is_that_of_the_reference(setup):
    it = setup("1x100", 0.2)
    [call, *_] = NAMED["sparse per-head"].make(it).calls
    call()
    query, layer, table, count, starts, scale, out, length = call.args
    wanted = torch.empty_like(out)
    reference.sparse_attention(query, layer, table, count, starts, scale, wanted, length)
    assert torch.allclose(out, wanted, atol=2e-2 if out.dtype == torch.bfloat16 else 1e-4)


def test_each_kernel_of_a_search_is_given_what_those_before_it_made(setup):
    it = Search(setup("2x100", 0.2))
    assert (it.sketch.thresholds[:2] >= 0).all(), "each request has one of its own carried over"
    assert len(it.calls_of("carry_thresholds")) == 1, "once a step"
    calls = it.calls_of("list_pages")
    assert len(calls) == len(it.layers) >= 2
    it.sketch.page_table.zero_()
    calls[1]()
    listed = it.sketch.page_table.clone()
    table, kept = it.select(1)
    assert (kept < 100).all(), "a part is read"
    for row, head in ((0, 0), (1, 1)):
        number = int(kept[row, head])
        assert torch.equal(listed[0, row, head, :number], table[row, head, :number])

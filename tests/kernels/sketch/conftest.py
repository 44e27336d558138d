"""Batches of the sketch's operations: a paged cache with room behind its blocks, everything that must not be read
poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from specattn_vllm.kernels.sketch import contracts, reference
from specattn_vllm.kernels.sketch.layout import SketchLayout, sketch_views
from specattn_vllm.sketch.rotation import rotation

STALE = 2_000_000_000  # a block that following faults
OFFSET = 3  # blocks before the first of the layer: its cache does not begin where its memory does


@dataclass
class Batch:
    """One step's batch: R rows over a sketched cache. ``key`` [tokens, H, D] is what was written, by slot."""

    kv_cache: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    dense: torch.Tensor
    valid_lens: torch.Tensor
    query: torch.Tensor
    rotation: torch.Tensor
    centre: torch.Tensor
    max_query_len: int
    width: int
    page_strides: tuple[int, int, int]

    @property
    def rows(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def heads(self) -> int:
        return self.codes.shape[1]

    @property
    def step(self) -> tuple[torch.Tensor, ...]:
        return self.query_start_loc, self.seq_lens, self.dense, self.block_table

    def context(self, row: int) -> int:
        return int(self.seq_lens[row] - (self.query_start_loc[row + 1] - self.query_start_loc[row]))


def build(
    lens, q_lens, heads, group, size, bits, block_size, layout, device, dtype, dense=(), seed=0, rejected=0
) -> Batch:
    """Rows of ``lens`` tokens, the last ``q_lens`` of which are the step's own; rows in ``dense`` read everything. The
    last ``rejected`` of a row's own, but never the first, have queries that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = SketchLayout(heads, block_size, size, bits, dtype.itemsize)
    page = (sizes.page_bytes + sizes.tail_bytes) // dtype.itemsize
    used = [-(-n // block_size) for n in lens]
    blocks = sum(used) + 2
    raw = torch.full(((OFFSET + blocks) * page,), torch.nan, dtype=dtype, device=device)
    shape = (blocks, heads, block_size, 2 * size)
    inner = (2 * size, heads * 2 * size) if layout == "LBNHC" else (block_size * 2 * size, 2 * size)
    kv_cache = raw.as_strided(shape, (page, *inner, 1), OFFSET * page)
    codes, scales = sketch_views(kv_cache, bits)
    codes.fill_(0xAA)
    scales.fill_(torch.nan)
    order = torch.randperm(blocks, generator=generator).int()
    table = torch.full((len(lens), max(used) + 2), STALE, dtype=torch.int32)
    turn = rotation(size, dtype, device)
    centre = (0.3 * torch.randn(heads, size, generator=generator)).to(device)
    first = 0
    for row, n in enumerate(lens):
        table[row, : used[row]] = order[first : first + used[row]]
        first += used[row]
        if n:
            key = (torch.randn(n, heads, size, generator=generator) + 1.0).to(dtype).to(device)
            p = torch.arange(n)
            slots = table[row, p // block_size].long() * block_size + p % block_size
            reference.encode_keys(key, slots.to(device), turn, centre, codes, scales)
    query = (3 * torch.randn(sum(q_lens) + 2, heads * group, size, generator=generator)).to(dtype)
    query[sum(q_lens) :] = torch.nan
    valid_lens = torch.tensor([max(n - rejected, min(n, 1)) for n in q_lens], dtype=torch.int32)
    for row, n in enumerate(q_lens):
        query[sum(q_lens[:row]) + int(valid_lens[row]) : sum(q_lens[:row]) + n] = torch.nan
    flags = torch.zeros(len(lens), dtype=torch.int32)
    flags[list(dense)] = 1
    row_strides = (page // (2 * size), *(stride // (2 * size) for stride in inner))
    return Batch(
        kv_cache, codes, scales, table.to(device),
        torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0).int().to(device),
        torch.tensor(lens, dtype=torch.int32, device=device), flags.to(device), valid_lens.to(device),
        query.to(device), turn, centre, max(1, *q_lens), -(-max(lens) // 64) * 64, row_strides,
    )  # fmt: skip


@pytest.fixture(scope="session")
def sketched():
    return build


@pytest.fixture(scope="session")
def prepared():
    """prepared(op, batch, dense_up_to) -> packed, factors, histogram, into poisoned buffers."""

    def run(op, batch: Batch, dense_up_to: int = 0):
        group = batch.query.shape[1] // batch.heads
        width = max(16, 1 << (batch.max_query_len * group - 1).bit_length())
        outer, device = (batch.rows, batch.heads), batch.query.device
        packed = torch.full((*outer, width, batch.query.shape[2]), 77, dtype=torch.int8, device=device)
        factors = torch.full((*outer, 3, width), torch.nan, device=device)
        histogram = torch.full((*outer, contracts.BINS), 99, dtype=torch.int32, device=device)
        op(
            batch.query, *batch.step[:3], batch.valid_lens, batch.step[3], batch.codes, batch.scales, batch.rotation,
            batch.query.shape[2] ** -0.5, batch.max_query_len, dense_up_to, packed, factors, histogram,
        )  # fmt: skip
        return packed, factors, histogram

    return run


@pytest.fixture(scope="session")
def scored():
    """scored(op, batch, packed, factors, sink, recent, dense_up_to) -> scores, histogram, chunks."""

    def run(op, batch: Batch, packed, factors, sink=4, recent=64, dense_up_to=0):
        outer, device = (batch.rows, batch.heads), packed.device
        scores = torch.full((*outer, batch.width), 201, dtype=torch.uint8, device=device)
        histogram = torch.zeros((*outer, contracts.BINS), dtype=torch.int32, device=device)
        number = -(-batch.width // contracts.CHUNK)
        chunks = torch.full((*outer, number, contracts.BINS), -5, dtype=torch.int16, device=device)
        op(
            packed,
            factors,
            *batch.step,
            batch.codes,
            batch.scales,
            sink,
            recent,
            dense_up_to,
            scores,
            histogram,
            chunks,
        )
        return scores, histogram, chunks

    return run


def nothing_carried(rows: int, device: torch.device, slots: int = 8) -> tuple[torch.Tensor, ...]:
    """Slots of rows, in another order than they lie in, and totals and thresholds of requests that are new."""
    order = (torch.arange(rows, device=device, dtype=torch.int32) * 3 + 1) % slots
    totals = torch.zeros((slots + 1, contracts.TOTALS), dtype=torch.int32, device=device)
    return order, totals, torch.full((slots + 1, 2), -1, dtype=torch.int32, device=device)


@pytest.fixture(scope="session")
def new_requests():
    return nothing_carried


@pytest.fixture(scope="session")
def selected():
    """selected(cut, list, batch, scores, histogram, chunks, budget, ahead, carried) -> cuts, starts, page table, kept.
    carried: slots, totals and thresholds."""

    def run(cut, pages, batch: Batch, scores, histogram, chunks, budget, ahead=0, carried=None):
        outer, device = (batch.rows, batch.heads), scores.device
        cuts = torch.full((*outer, 2), -77, dtype=torch.int32, device=device)
        starts = torch.full((*outer, chunks.shape[2], 2), -77, dtype=torch.int32, device=device)
        page_table = torch.full((*outer, batch.width), -77, dtype=torch.int32, device=device)
        kept = torch.full(outer, -77, dtype=torch.int32, device=device)
        starts_of, lens, dense, table = batch.step
        carried = carried or nothing_carried(batch.rows, device)
        cut(histogram, chunks, starts_of, lens, dense, scores, *carried, budget, cuts, starts)
        pages(
            scores, cuts, starts, starts_of, lens, table, batch.codes.shape[2], batch.page_strides, budget.sink,
            budget.recent, ahead, page_table, kept,
        )  # fmt: skip
        return cuts, starts, page_table, kept

    return run

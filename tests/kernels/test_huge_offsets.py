"""Offsets beyond 32 bits: a block table that names block 2^19 of a cache of 8 GiB, as a GPU's may be.

Each kernel runs twice, on near blocks, and on the same content in far ones, and has to give the same. In 32 bits, the
offset of a far block would be that of block 0 to 9, where other numbers lie. All of the memory is virtual, but for the
blocks that are written.
"""

from __future__ import annotations

import mmap

import pytest
import torch

from specattn_vllm.kernels import launchers
from specattn_vllm.kernels.sketch import reference as sketch
from specattn_vllm.kernels.sketch.contracts import BINS, Budget
from specattn_vllm.kernels.sketch.layout import sketch_views
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.sketch.rotation import rotation

HEADS, BLOCK, SIZE, BITS = 2, 16, 64, 2
PAGE = 2**13
"""Elements of a block: keys, values, codes, and room up to a power of two, so that offsets wrap to whole blocks."""
FAR = 2**32 // PAGE
LENGTH, QUERIES, RATIO = 150, 3, 2
BUDGET = Budget(0.3, min_tokens=8, sink=4, recent=16)


def memory(number: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """So many zeros, of which only those that are touched cost anything; on a GPU they cost what they are."""
    if device.type != "cpu":
        return torch.zeros(number, dtype=dtype, device=device)
    # Not promised to be there: else a machine that has less refuses.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, number * dtype.itemsize, flags=flags), dtype=dtype)


class Cached:
    """A request of LENGTH tokens in blocks from `first` on."""

    def __init__(self, first: int, device: torch.device) -> None:
        blocks = -(-LENGTH // BLOCK)
        whole = memory((first + blocks) * PAGE, torch.float16, device)
        row = 2 * SIZE
        shape, strides = (first + blocks, HEADS, BLOCK, row), (PAGE, row, HEADS * row, 1)
        self.kv_cache = whole.as_strided(shape, strides)
        self.codes, self.scales = sketch_views(self.kv_cache, BITS)
        # Where offsets of 32 bits would lead.
        generator = torch.Generator().manual_seed(1)
        self.kv_cache[:blocks] = torch.randn((blocks, *shape[1:]), generator=generator).half().to(device)
        self.codes[:blocks], self.scales[:blocks] = 0x1B, 0.5
        self.first, self.blocks = first, blocks
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(2))
        self.block_table = (first + order).int().to(device)[None]
        p = torch.arange(LENGTH)
        self.slots = ((first + order[p // BLOCK]) * BLOCK + p % BLOCK).to(device)

    def content(self) -> tuple[torch.Tensor, ...]:
        mine = slice(self.first, self.first + self.blocks)
        return self.kv_cache[mine].clone(), self.codes[mine].clone(), self.scales[mine].clone()


class Step:
    """The arguments of a step that reads it."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator).half().to(device)  # noqa: E731
        self.device = device
        self.key, self.value = draw(LENGTH, HEADS, SIZE), draw(LENGTH, HEADS, SIZE)
        self.query = 3 * draw(QUERIES, HEADS * RATIO, SIZE)
        self.seq_lens, self.starts = self.ints([LENGTH]), self.ints([0, QUERIES])
        self.dense, self.valid = self.ints([0]), self.ints([QUERIES])
        self.rotation = rotation(SIZE, torch.float16, device)
        self.centre = torch.zeros((HEADS, SIZE), device=device)
        self.scale = SIZE**-0.5

    def ints(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def empty(self, *shape, dtype=torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


@pytest.fixture(scope="module")
def caches():
    """caches(device) -> the same request in near blocks and in far ones, written by the reference."""
    known = {}

    def of(device: torch.device) -> list[Cached]:
        if device not in known:
            step, known[device] = Step(device), [Cached(first, device) for first in (BLOCK, FAR)]
            for cached in known[device]:
                places = cached.slots, step.rotation, step.centre, cached.codes, cached.scales
                sketch.encode_keys(step.key, *places, step.value, cached.kv_cache)
        return known[device]

    return of


def encode_keys(op, step, cached):
    before = cached.content()
    cached.kv_cache[cached.first :] = 7
    op(step.key, cached.slots, step.rotation, step.centre, cached.codes, cached.scales, step.value, cached.kv_cache)
    found = cached.content()
    for whole, mine in zip((cached.kv_cache, cached.codes, cached.scales), before, strict=True):
        whole[cached.first :] = mine  # for the other tests
    return found


def draft_attention(op, step, cached):
    out, lse = torch.zeros_like(step.query), step.empty(1, HEADS * RATIO)
    scores = step.empty(1, HEADS * RATIO, LENGTH)
    batch = step.query, cached.kv_cache, cached.block_table, step.seq_lens, step.starts, step.scale
    op(*batch, out, torch.tensor([[QUERIES - 1]], device=step.device), scores, lse, QUERIES)
    return out, scores, lse


def sparse_attention(op, step, cached):
    block, head, token = page_strides(cached.kv_cache)
    p = torch.arange(0, LENGTH, 2, device=step.device)
    table = cached.block_table[0, p // BLOCK] * block + p % BLOCK * token
    table = torch.stack((table, table + head)).int()[None]
    out, lse = torch.zeros_like(step.query), step.empty(*step.query.shape[:2])
    kept = step.ints([[len(p)] * HEADS])
    op(step.query, cached.kv_cache, table, kept, step.starts, step.scale, out, QUERIES, lse)
    return out, lse


def bound_lost(op, step, cached):
    positions = torch.arange(0, 128, 4, device=step.device).int().expand(1, HEADS, -1).contiguous()
    lost, lse = step.empty(1, HEADS), torch.full(step.query.shape[:2], 9.0, device=step.device)
    batch = step.query, cached.kv_cache, cached.block_table, step.starts
    op(*batch, positions, torch.ones_like(positions).float(), lse, step.scale, 1.64, QUERIES, lost)
    return (lost,)


def prepare_queries(op, step, cached):
    packed = step.empty(1, HEADS, 16, SIZE, dtype=torch.int8)
    factors, histogram = step.empty(1, HEADS, 3, 16), step.empty(1, HEADS, BINS, dtype=torch.int32)
    batch = step.query, step.starts, step.seq_lens, step.dense, step.valid, cached.block_table
    op(*batch, cached.codes, cached.scales, step.rotation, step.scale, QUERIES, 0, packed, factors, histogram)
    return packed, factors


def score_tokens(op, step, cached):
    packed, factors = prepare_queries(sketch.prepare_queries, step, cached)
    scores = step.empty(1, HEADS, 192, dtype=torch.uint8)
    histogram, chunks = step.empty(1, HEADS, BINS, dtype=torch.int32), step.empty(1, HEADS, 1, BINS, dtype=torch.int16)
    batch = step.starts, step.seq_lens, step.dense, cached.block_table, cached.codes, cached.scales
    op(packed, factors, *batch, BUDGET.sink, BUDGET.recent, 0, scores, histogram, chunks)
    return scores, histogram, chunks


READERS = (encode_keys, draft_attention, sparse_attention, bound_lost, prepare_queries, score_tokens)


@pytest.mark.parametrize("run", READERS, ids=lambda run: run.__name__)
def test_blocks_that_lie_far(run, device, caches):
    step = Step(device)
    near, far = (run(getattr(launchers, run.__name__), step, cached) for cached in caches(device))
    for mine, its in zip(near, far, strict=True):
        assert torch.equal(mine, its)
        assert mine.float().abs().max() > 0, "nothing was computed"


def pages(op: str, step: Step, first: int) -> list[int]:
    """Page ids that a table gets, for blocks from `first` on: every second token of head 0."""
    table = step.ints([[first + 3, first, first + 1]])
    page_table, kept = step.empty(1, 1, 1, 48, dtype=torch.int32), step.ints([[[0]]])
    strides = PAGE // (2 * SIZE), 1, HEADS
    if op == "list_pages":
        scores = (torch.arange(64, device=step.device) % 2).to(torch.uint8).expand(1, 1, -1).contiguous()
        batch = scores, step.ints([[[0, 24]]]), step.empty(1, 1, 1, 2, dtype=torch.int32), step.ints([0, 0])
        launchers.list_pages(*batch, step.ints([48]), table, BLOCK, strides, 0, 0, 0, page_table[0], kept[0])
    else:
        bits = step.ints([[[[-1431655766, 43690]]]])
        slots = torch.zeros(1, dtype=torch.int64, device=step.device)
        launchers.build_page_tables(
            bits, slots, step.ints([48]), step.ints([48]), table, BLOCK, strides, page_table, kept
        )
    assert int(kept[0, 0, 0]) == 24
    return page_table[0, 0, 0, :24].tolist()


@pytest.mark.parametrize("op", ["list_pages", "build_page_tables"])
def test_pages_of_blocks_that_lie_far(op, device):
    """They count rows of a key and a value in 32 bits: as many as fit into 2^31 rows of 2^38 elements."""
    step = Step(device)
    far = 2**31 // (PAGE // (2 * SIZE)) - 4
    for first in (0, far):
        blocks = [first + 3, first, first + 1]
        wanted = [blocks[p // BLOCK] * (PAGE // (2 * SIZE)) + p % BLOCK * HEADS for p in range(1, 48, 2)]
        assert pages(op, step, first) == wanted
        assert max(wanted) < 2**31


def test_rows_that_lie_far(device):
    """Scores and page tables of a fifth row, 2^32 elements behind those of the first."""
    step, rows = Step(device), 5
    lens, starts = step.ints([48] * rows), step.ints([0] * (rows + 1))
    scores = memory(2**32 + 64, torch.uint8, device).as_strided((rows, 1, 64), (2**30, 64, 1))
    page_table = memory(2**32 + 48, torch.int32, device).as_strided((rows, 1, 48), (2**30, 48, 1))
    scores.zero_()
    page_table.fill_(-7)
    scores[4] = (torch.arange(64, device=device) % 2).to(torch.uint8)
    cuts = step.ints([[[1, 0]]] * 4 + [[[0, 24]]])
    kept, table = step.ints([[0]] * rows), step.ints([[3 * row, 3 * row + 1, 3 * row + 2] for row in range(rows)])
    batch = scores, cuts, step.empty(rows, 1, 1, 2, dtype=torch.int32), starts
    launchers.list_pages(*batch, lens, table, BLOCK, (16, 1, 1), 0, 0, 0, page_table, kept)
    assert kept.tolist() == [[0]] * 4 + [[24]]
    assert (page_table[:4] == -7).all()
    assert page_table[4, 0, :24].tolist() == [192 + p for p in range(1, 48, 2)]

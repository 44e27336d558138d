"""A pruner on a fake cache, and steps of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.selection.plan import SparsePlan
from specattn_vllm.selection.pruner import Pruner
from specattn_vllm.selection.store import SelectionStore
from specattn_vllm.stats import Counters

BLOCKS, HEADS, BLOCK, SIZE = 40, 2, 4, 4
MAX_LEN, SLOTS = 30, 6  # 30 is no whole number of blocks
# Five target layers: two read source 0, one reads source 1, two read everything.
LAYERS = {"model.layers.1": 0, "model.layers.2": 0, "model.layers.4": 1}
NUM_LAYERS, SOURCES = 5, 2
CPU = torch.device("cpu")

FILL = -1
# Following one of these is an index error; vLLM does not clear a block table between requests.
STALE = 1_000_000


@dataclass
class Row:
    """A request in a step: `query` tokens are computed now, after `computed` earlier ones.

    Without a slot (-1), it only fills a graph's batch.
    """

    slot: int
    computed: int
    query: int = 3
    prefilling: bool = False

    @property
    def length(self) -> int:
        return self.computed + self.query


class Setup:
    """A pruner on a fake cache whose rows say where they lie; `groups`: 1 selection for all heads, or one for each."""

    def __init__(self, layout: str, groups: int = 1) -> None:
        b, h, n = torch.meshgrid(torch.arange(BLOCKS), torch.arange(HEADS), torch.arange(BLOCK), indexing="ij")
        rows = torch.stack((b, h, n, b), dim=-1).repeat(1, 1, 1, 2 * SIZE // 4).float()
        self.cache = rows.transpose(1, 2).contiguous().transpose(1, 2) if layout == "LBNHC" else rows.contiguous()
        self.layout, self.groups = layout, groups
        self.store = SelectionStore(SOURCES, SLOTS, groups, MAX_LEN, CPU)
        # More layers and longer rows than the target needs: it serves the draft too.
        self.tables = torch.empty((SOURCES + 2, SLOTS, groups, MAX_LEN + 5), dtype=torch.int32)
        self.counters = Counters(CPU)
        self.pruner = Pruner(
            self.store,
            executors.resolve("torch", CPU),
            self.counters,
            layer_sources=LAYERS,
            num_layers=NUM_LAYERS,
            num_kv_heads=HEADS,
            max_query_len=5,
            page_table=self.tables,
        )
        self.pruner.attach(BLOCK, lambda: page_strides(self.cache))
        self.generator = torch.Generator().manual_seed(0)

    def select(self, slot: int, length: int, *tokens: set[int]) -> None:
        """Store a selection of a set of tokens per source and group, sources outermost."""
        bits = torch.zeros(SOURCES, 1, self.groups, self.store.bits.shape[-1], dtype=torch.int32)
        for i, chosen in enumerate(tokens):
            for word in range(bits.shape[-1]):
                value = sum(1 << p % 32 for p in chosen if p // 32 == word)
                bits[i // self.groups, 0, i % self.groups, word] = value - 2**32 if value >= 2**31 else value
        self.store.put(torch.tensor([slot]), bits, torch.tensor([length], dtype=torch.int32))

    def step(self, rows: Sequence[Row], table: torch.Tensor) -> SparsePlan | None:
        """The plan of a step whose rows have these blocks."""
        starts = torch.tensor([0, *itertools.accumulate(row.query for row in rows)], dtype=torch.int32)
        prefilling = torch.tensor([row.prefilling for row in rows])
        plan = self.pruner.prune(
            slots=torch.tensor([row.slot for row in rows]),
            slots_cpu=np.array([row.slot for row in rows]),
            prefilling=prefilling.clone(),
            prefilling_cpu=prefilling,
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=torch.tensor([row.length for row in rows], dtype=torch.int32),
            block_table=table,
        )
        self.counters.commit()  # a real step, not one to warm up
        return plan

    def prune(self, *rows: Row):
        """Prune a step; the plan, and the tokens it keeps as {(source, row, head): [tokens]}."""
        # Poisoned, so that nothing of an earlier call can pass for a result.
        self.tables.fill_(-(2**30))
        self.pruner._kept.fill_(-7)
        width = -(-MAX_LEN // BLOCK)
        table = torch.full((len(rows), width), STALE, dtype=torch.int32)
        free = torch.randperm(BLOCKS, generator=self.generator).tolist()
        for r, row in enumerate(rows):
            for i in range(-(-row.length // BLOCK)):
                table[r, i] = free.pop()
        plan = self.step(rows, table)
        if plan is None:
            return None, None
        assert plan.page_table.shape[:3] == plan.kept.shape == (SOURCES, plan.num_rows, self.groups)
        # What a fake page holds is where it lies: block, head and offset, which the table turns into a position.
        block, head, token = page_strides(self.cache)
        place = {
            b * block + h * head + n * token: (b, h, n)
            for b, h, n in itertools.product(range(BLOCKS), range(HEADS), range(BLOCK))
        }
        tokens = {}
        for s, r, h in itertools.product(range(SOURCES), range(plan.num_rows), range(HEADS)):
            group = h if self.groups > 1 else 0
            position = {int(b): i for i, b in enumerate(table[r]) if b != STALE}
            kept = []
            for page in plan.page_table[s, r, group, : int(plan.kept[s, r, group])].tolist():
                # Shared pages are those of head 0; whoever reads for another head steps on by its stride.
                page_block, page_head, offset = place[page + (h - group) * head]
                assert page_head == h
                kept.append(position[page_block] * BLOCK + offset)
            tokens[s, r, h] = kept
            assert (plan.page_table[s, r, group, len(kept) :] == -(2**30)).all()
        assert (self.tables[SOURCES:] == -(2**30)).all()
        assert (self.tables[:, plan.num_rows :] == -(2**30)).all()
        return plan, tokens


@pytest.fixture(params=["LBNHC", "LBHNC"])
def setup(request):
    return Setup(request.param)


@pytest.fixture
def new_setup():
    """new_setup(layout, groups) -> a `Setup`."""
    return Setup


@pytest.fixture
def row():
    """row(slot, computed, query, prefilling) -> a `Row`."""
    return Row


@pytest.fixture
def both_heads():
    """both_heads(tokens by row, of each source) -> {(source, row, head): tokens}: all heads share a selection."""
    return of_both_heads


def of_both_heads(*per_source_and_row: list[list[int]]) -> dict:
    """{(source, row, head): tokens} from one list of rows per source: selections are shared by all heads."""
    return {
        (s, r, h): list(tokens)
        for s, rows in enumerate(per_source_and_row)
        for r, tokens in enumerate(rows)
        for h in range(HEADS)
    }

"""What a target that drafts for itself reads, step by step, page by page; and the window that chooses by place."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.kernels import reference
from specattn_vllm.kernels.reference import unpack_bits
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.choose import Limits
from specattn_vllm.selection.draft_tables import DraftTables
from specattn_vllm.selection.window import Window

CPU = torch.device("cpu")
BLOCK, MAX_LEN, MAX_REQS, STEPS = 4, 30, 5, 3  # 30 is no whole number of blocks
WIDTH, WORDS, HEADS = 35, 2, 2  # wider than the longest request: rows are whole vectors
LAYERS = {"model.layers.0": 0, "model.layers.1": 1}
STRIDES = (BLOCK * HEADS, 1, HEADS)  # token-major
STALE, POISON = 1_000_000, -(2**30)
TORCH = executors.resolve("torch", CPU)
BLOCKS_OF = dataclasses.replace(TORCH, build_page_tables=reference.build_block_tables, granularity="block")


def make(operations=TORCH) -> DraftTables:
    memory = torch.full((len(LAYERS), MAX_REQS, 1, WIDTH), POISON, dtype=torch.int32)
    made = DraftTables(operations, LAYERS, memory, 0)
    made._kept.fill_(-7)
    made.attach(BLOCK, lambda: STRIDES)
    return made


class Round:
    """Chosen positions per (source, row), lengths that each step sees, and where the blocks lie."""

    def __init__(self, committed: list[int], prefix_lens: list[int], seed: int = 0) -> None:
        rng, rows = random.Random(seed), len(committed)
        self.prefix_lens = prefix_lens
        # As the speculator gives them: nothing past the longest request, zero for a row for which nothing is drafted.
        self.steps = [[min(n + k, MAX_LEN) if n else 0 for n in committed] for k in range(1, STEPS + 1)]
        self.chosen = {
            key: {p for p in range(prefix_lens[key[1]]) if rng.random() < 0.4}
            for key in itertools.product(range(len(LAYERS)), range(rows))
        }
        free = rng.sample(range(100), rows * 8)
        # A block table is not cleared between requests.
        self.blocks = [
            [free.pop() if i * BLOCK < self.steps[-1][r] else STALE for i in range(-(-MAX_LEN // BLOCK))]
            for r in range(rows)
        ]

    def build(self, tables: DraftTables) -> torch.Tensor:
        rows = len(self.prefix_lens)
        # By request first, as they are made; bits past the prefix say nothing.
        bits = torch.full((rows, len(LAYERS), 1, WORDS), -1, dtype=torch.int32)
        for (s, r), positions in self.chosen.items():
            for word in range(WORDS):
                inside = range(word * 32, word * 32 + 32)
                value = sum(1 << p % 32 for p in inside if p in positions or p >= self.prefix_lens[r])
                bits[r, s, 0, word] = value - 2**32 if value >= 2**31 else value
        return tables.build(
            bits.transpose(0, 1),
            torch.tensor(self.prefix_lens, dtype=torch.int32),
            torch.tensor(self.steps, dtype=torch.int32).view(STEPS, rows),
            torch.tensor(self.blocks, dtype=torch.int32).view(rows, -1),
        )

    def read(self, step: int, s: int, r: int) -> list[int]:
        """Positions that a row reads: what was chosen, and all that is newer."""
        return [p for p in range(self.steps[step][r]) if p >= self.prefix_lens[r] or p in self.chosen[s, r]]


# Tokens that a row has, those that are ranked: some rejected, all accepted, a first token, nothing to draft, the end.
COMMITTED, PREFIX = [17, 24, 1, 0, 29], [14, 24, 1, 0, 26]


def test_each_step_reads_what_was_chosen_and_all_that_is_newer():
    given, tables = Round(COMMITTED, PREFIX), make()
    given.build(tables)
    block, _, token = STRIDES
    for k in range(STEPS):
        plan = tables.plan(k)
        assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (5, 5, 1)
        assert plan.layer_sources == LAYERS
        assert plan.kept.shape == (len(LAYERS), 5, 1)
        for s, r in given.chosen:
            pages = [given.blocks[r][p // BLOCK] * block + p % BLOCK * token for p in given.read(k, s, r)]
            assert int(plan.kept[s, r, 0]) == len(pages)
            assert plan.page_table[s, r, 0, : len(pages)].tolist() == pages


def test_a_row_for_which_nothing_is_drafted_reads_nothing():
    given, tables = Round(COMMITTED, PREFIX), make()
    kept = given.build(tables)
    assert kept.shape == (STEPS, len(LAYERS), 5, 1)
    assert not kept[:, :, 3].any()
    assert (tables.plan(0).page_table[:, 3] == POISON).all()


def test_at_the_end_of_the_context_steps_see_the_same():
    given, tables = Round(COMMITTED, PREFIX), make()
    kept = given.build(tables)
    assert [step[4] for step in given.steps] == [MAX_LEN] * STEPS
    assert kept[0, :, 4].tolist() == kept[1, :, 4].tolist() == kept[2, :, 4].tolist()
    # All others see a token more with each step.
    assert (kept[1:, :, :3] - kept[:-1, :, :3] == 1).all()


def test_steps_of_blocks_end_where_their_tokens_do():
    """For an executor that reads whole blocks: those with a chosen token or a newer one, up to the step's own token."""
    given, tables = Round([17, 24, 6, 0], [14, 24, 6, 0]), make(BLOCKS_OF)
    given.build(tables)
    for k in range(STEPS):
        plan = tables.plan(k)
        assert plan.page_table.shape[-1] == -(-WIDTH // BLOCK)
        for s, r in given.chosen:
            # A block is read from the first step on in which some step reads of it; what a step sees of it is its part.
            blocks = sorted({p // BLOCK for p in given.read(STEPS - 1, s, r)})
            seen = sum(min(given.steps[k][r] - b * BLOCK, BLOCK) for b in blocks if b * BLOCK < given.steps[k][r])
            assert int(plan.kept[s, r, 0]) == seen
            listed = -(-seen // BLOCK)
            assert plan.page_table[s, r, 0, :listed].tolist() == [given.blocks[r][b] for b in blocks[:listed]]


def test_rounds_of_different_sizes_do_not_see_each_other():
    tables = make()
    for seed, committed in enumerate(([20, 9, 3], [11], [5, 5, 5, 5, 5])):
        tables._page_table.fill_(POISON)
        given = Round(committed, [max(n - 2, 0) for n in committed], seed=seed)
        given.build(tables)
        plan = tables.plan(1)
        assert plan.num_rows == len(committed)
        for s, r in given.chosen:
            assert int(plan.kept[s, r, 0]) == len(given.read(1, s, r))
        assert (tables._page_table[:, len(committed) :] == POISON).all()


def test_the_cache_is_looked_at_in_each_round():
    """vLLM allocates it after the tables, and when it profiles CUDA graphs, twice."""
    given, tables = Round([5], [0]), make()
    given.build(tables)
    one = tables.plan(0).page_table[0, 0, 0, :6].tolist()
    tables.attach(BLOCK, lambda: (3 * BLOCK * HEADS, 1, HEADS))
    given.build(tables)
    assert tables.plan(0).page_table[0, 0, 0, :6].tolist() != one


# The window


def window(**options) -> Window:
    limits = Limits.of(SpecAttnOptions.parse({"method": "streamingllm", **options}))
    made = Window(TORCH, limits, MAX_REQS, MAX_LEN, CPU)
    made.bits.fill_(-1)
    made.counts.fill_(7)
    return made


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"ratio": 0.5, "min_tokens": 0, "sink_tokens": 3, "recent_tokens": 1}, 15),
        ({"ratio": 0.1, "min_tokens": 12, "sink_tokens": 3, "recent_tokens": 1}, 12),
        ({"ratio": 1.0, "min_tokens": 0, "max_tokens": 9, "sink_tokens": 3, "recent_tokens": 1}, 9),
        # What is always kept may be more than the budget.
        ({"ratio": 0.1, "min_tokens": 0, "sink_tokens": 3, "recent_tokens": 5}, 8),
        ({"ratio": 0.25, "min_tokens": 0, "sink_tokens": 0, "recent_tokens": 0}, 8),
    ],
    ids=["a share", "the floor", "the cap", "what is always kept", "no sink"],
)
def test_a_window_holds_the_first_and_the_last_tokens(options, kept):
    bits, prefix_lens = window(**options).select(torch.tensor([True]), torch.tensor([MAX_LEN], dtype=torch.int32))
    assert prefix_lens.tolist() == [MAX_LEN]
    sink = options["sink_tokens"]
    positions = unpack_bits(bits[0, 0, 0], MAX_LEN).nonzero().flatten().tolist()
    assert positions == [*range(sink), *range(MAX_LEN - (kept - sink), MAX_LEN)]


def test_rows_of_a_window_are_as_long_as_they_are():
    made = window(ratio=0.5, min_tokens=0, sink_tokens=1, recent_tokens=1)
    wanted = torch.tensor([True, False, True, True])
    bits, prefix_lens = made.select(wanted, torch.tensor([20, 30, 1, 0], dtype=torch.int32))
    assert bits.shape == (4, 1, 1, 1) and prefix_lens.dtype == torch.int32
    assert prefix_lens.tolist() == [20, 0, 1, 0]
    positions = [unpack_bits(row, 32).nonzero().flatten().tolist() for row in bits[:, 0, 0]]
    assert positions == [[0, *range(11, 20)], [], [0], []]


def test_a_window_s_size_is_that_of_its_buffers():
    assert window().nbytes == {"mass": 4 * MAX_REQS * MAX_LEN, "bitmasks": 4 * MAX_REQS * 2}

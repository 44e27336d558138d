"""The pruner: which tokens each row of a step reads, and that the counters say so."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.kernels import reference
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.selection.plan import SparsePlan
from specattn_vllm.selection.pruner import Pruner, TableMaps
from specattn_vllm.selection.store import NO_SELECTION, SelectionStore
from specattn_vllm.stats import Counters, Counts

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


def both_heads(*per_source_and_row: list[list[int]]) -> dict:
    """{(source, row, head): tokens} from one list of rows per source: selections are shared by all heads."""
    return {
        (s, r, h): list(tokens)
        for s, rows in enumerate(per_source_and_row)
        for r, tokens in enumerate(rows)
        for h in range(HEADS)
    }


def test_rows_without_a_selection_keep_everything(setup):
    plan, tokens = setup.prune(Row(0, 8), Row(3, 1, query=1), Row(2, MAX_LEN - 3))
    everything = [range(11), range(2), range(MAX_LEN)]
    assert tokens == both_heads(everything, everything)
    assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (3, 7, 3)
    assert plan.layer_sources == LAYERS


def test_a_row_with_a_selection_keeps_it_and_the_new_tokens(setup):
    setup.select(4, 9, {0, 3, 8}, {1})
    _, tokens = setup.prune(Row(4, 9))
    assert tokens == both_heads([[0, 3, 8, 9, 10, 11]], [[1, 9, 10, 11]])


def test_bits_past_the_length_of_the_selection_say_nothing(setup):
    setup.select(4, 9, {0, 25}, {1, 9})
    _, tokens = setup.prune(Row(4, 9, query=1))
    assert tokens == both_heads([[0, 9]], [[1, 9]])


def test_an_empty_selection_leaves_the_new_tokens(setup):
    setup.select(1, 6, set(), {5})
    _, tokens = setup.prune(Row(1, 6, query=2))
    assert tokens == both_heads([[6, 7]], [[5, 6, 7]])


def test_each_row_gets_its_own(setup):
    setup.select(5, 4, {0}, {1})
    setup.select(0, 20, {2, 19}, {3})
    setup.select(2, 8, {7}, {6})
    plan, tokens = setup.prune(Row(2, 9), Row(5, 4, query=1), Row(1, 4, query=1), Row(0, 20, query=2))
    # Slot 2 holds a selection for 8 tokens, and the row has computed 9: stale. Slot 1 never had one.
    assert tokens == both_heads(
        [range(12), [0, 4], range(5), [2, 19, 20, 21]],
        [range(12), [1, 4], range(5), [3, 20, 21]],
    )
    assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (4, 7, 3)


def test_a_selection_that_fills_the_model_length(setup):
    setup.select(0, MAX_LEN - 1, set(range(0, MAX_LEN, 2)), {MAX_LEN - 2})
    _, tokens = setup.prune(Row(0, MAX_LEN - 1, query=1))
    assert tokens == both_heads([[*range(0, MAX_LEN - 1, 2), MAX_LEN - 1]], [[MAX_LEN - 2, MAX_LEN - 1]])


def test_random_steps_agree_with_a_plain_oracle(setup):
    rng = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    for _ in range(20):
        rows, wanted = [], [[], []]
        for slot in torch.randperm(SLOTS, generator=rng)[: number(1, SLOTS + 1)].tolist():
            row = Row(slot, number(1, 20), query=number(1, 5))
            chosen = [{p for p in range(row.computed) if number(0, 2)} for _ in range(SOURCES)]
            fits = bool(number(0, 2))
            setup.select(slot, row.computed if fits else row.computed + 1, *chosen)
            for s in range(SOURCES):
                wanted[s].append([p for p in range(row.length) if not fits or p >= row.computed or p in chosen[s]])
            rows.append(row)
        _, tokens = setup.prune(*rows)
        assert tokens == both_heads(*wanted)


# Batches with prefills


def test_a_short_prefill_among_verifications_reads_everything(setup):
    """vLLM sorts by length, so a chunk as short as a verification stands among them; it has no selection of its own."""
    for slot in range(4):
        setup.select(slot, 8, {0}, {1})
    plan, tokens = setup.prune(
        Row(0, 8), Row(1, 8, query=5, prefilling=True), Row(2, 8, query=1), Row(3, 8, query=6, prefilling=True)
    )
    assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (3, 9, 5)
    assert tokens == both_heads([[0, 8, 9, 10], range(13), [0, 8]], [[1, 8, 9, 10], range(13), [1, 8]])
    counts = setup.counters.read()
    assert (counts.verify_rows, counts.sparse_rows, counts.prefill_rows) == (2, 2, 2)
    # What the prefilling row read is nobody's verification: rows of 11 and 9 tokens, 2 heads, 5 layers.
    assert counts.kv_full == (11 + 9) * 2 * 5
    # The prefilling rows lost their selections, the others kept theirs.
    assert setup.store.prefix_lens[:4].tolist() == [8, NO_SELECTION, 8, NO_SELECTION]


def test_a_step_of_long_prefills_has_no_plan_and_clears_its_slots(setup):
    setup.select(2, 10, {0}, {1})
    setup.select(3, 10, {0}, {1})
    assert setup.prune(Row(2, 0, query=6, prefilling=True)) == (None, None)
    assert setup.counters.read() == Counts(prefill_rows=1)
    # Slot 2 has a new request. When it is as long as the old one was, it reads everything.
    _, tokens = setup.prune(Row(2, 10, query=1), Row(3, 10, query=1))
    assert tokens == both_heads([range(11), [0, 10]], [range(11), [1, 10]])


def test_short_rows_that_all_prefill_get_tables_too(setup):
    """vLLM runs a prompt's last token through the graph of verifications, which reads the tables in any case."""
    setup.select(2, 10, {0}, {1})
    plan, tokens = setup.prune(Row(2, 10, query=1, prefilling=True), Row(4, 0, query=5, prefilling=True))
    assert tokens == both_heads([range(11), range(5)], [range(11), range(5)])
    assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (2, 6, 5)
    # Nothing was verified, so nothing was read in its place.
    assert setup.counters.read() == Counts(prefill_rows=2)
    assert setup.store.prefix_lens[2] == NO_SELECTION


def test_a_step_that_starts_with_a_long_prefill_has_no_plan(setup):
    """vLLM never sorts a step so; a row that stands behind reads everything."""
    assert setup.prune(Row(2, 0, query=6, prefilling=True), Row(3, 5)) == (None, None)
    assert setup.counters.read() == Counts(prefill_rows=1)


# Counters


def test_the_counters_equal_numbers_worked_out_by_hand(setup):
    setup.select(0, 9, {0, 3, 8}, {1})  # used: keeps 3 + 3 of 12 and 1 + 3 of 12
    setup.select(1, 7, {0}, {0})  # stale
    setup.prune(Row(0, 9), Row(1, 8, query=2), Row(2, 5, query=1), Row(3, 4, query=7, prefilling=True))
    # Lengths 12, 10 and 6 make 28 tokens. Entries are per KV head, of which there are 2.
    dense = 28 * 2
    source_0, source_1 = (6 + 10 + 6) * 2, (4 + 10 + 6) * 2
    assert setup.counters.read() == Counts(
        verify_rows=3,
        sparse_rows=1,
        stale_rows=1,
        no_selection_rows=1,
        prefill_rows=1,
        kv_read=2 * source_0 + 1 * source_1 + 2 * dense,
        kv_full=5 * dense,
    )
    assert setup.counters.read().kv_read == 240
    assert setup.counters.read().kv_full == 280


def test_rows_that_are_dense_on_purpose_are_counted_apart(setup):
    """On the host: nothing was selected for them, whatever their slots held."""
    setup.store.hold(0, exact=True)
    setup.store.note_small_batch(np.array([0, 1, 3]), True)
    setup.select(2, 9, {0}, {1})
    setup.prune(Row(0, 9), Row(1, 8, query=2), Row(2, 9, query=1), Row(3, 9, prefilling=True), Row(FILL, 0, query=0))
    counts = setup.counters.read()
    assert (counts.verify_rows, counts.sparse_rows, counts.no_selection_rows) == (3, 1, 2)
    assert (counts.exact_rows, counts.small_batch_rows, counts.unselected_rows) == (1, 1, 0)
    setup.store.note_small_batch(np.array([1]), False)
    setup.prune(Row(1, 8, query=2))
    counts = setup.counters.read()
    assert (counts.exact_rows, counts.small_batch_rows, counts.unselected_rows) == (1, 1, 1)


def test_the_counters_add_up_over_steps(setup):
    setup.select(0, 9, {0}, {1})
    setup.prune(Row(0, 9, query=1))
    setup.prune(Row(0, 10, query=1))
    counts = setup.counters.read()
    assert (counts.verify_rows, counts.sparse_rows, counts.stale_rows) == (2, 1, 1)
    assert counts.kv_read == 2 * (2 * 3 + 10 * 2) + 2 * 11 * 5
    assert counts.kv_full == 2 * (10 + 11) * 5


def test_a_step_that_warms_up_is_not_counted(setup):
    setup.prune(Row(0, 8))
    before = setup.counters.read()
    commit, setup.counters.commit = setup.counters.commit, setup.counters.discard
    setup.prune(Row(0, 8), Row(1, 6, prefilling=True))
    setup.counters.commit = commit
    setup.counters.commit()
    assert setup.counters.read() == before != Counts()


# Batches of a CUDA graph


def test_rows_that_fill_a_graph_s_batch_keep_nothing_and_count_nothing(setup):
    setup.select(0, 9, {0, 3}, {1})
    rows = [Row(0, 9), Row(5, 4)]
    plan, tokens = setup.prune(*rows, Row(FILL, 0, query=0), Row(FILL, 0, query=0))
    assert tokens == both_heads([[0, 3, 9, 10, 11], range(7), [], []], [[1, 9, 10, 11], range(7), [], []])
    assert (plan.kept[:, 2:] == 0).all()
    assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (4, 6, 3)
    filled = setup.counters.read()
    other = Setup(setup.layout)
    other.select(0, 9, {0, 3}, {1})
    other.prune(*rows)
    assert filled == other.counters.read()
    assert (filled.verify_rows, filled.sparse_rows, filled.no_selection_rows) == (2, 1, 1)


def test_rows_that_fill_a_batch_read_nothing_of_nobody_s_slot(setup):
    """Drafting leaves bits there too: those of the rows that filled its own batch."""
    setup.store.put(torch.tensor([FILL]), torch.full_like(setup.store.bits[:, :1], -1), torch.tensor([4]).int())
    before = setup.store.prefix_lens.clone()
    plan, _ = setup.prune(Row(0, 9), Row(FILL, 0, query=0))
    assert (plan.kept[:, 1] == 0).all()
    assert torch.equal(setup.store.prefix_lens, before)
    counts = setup.counters.read()
    assert (counts.verify_rows, counts.no_selection_rows, counts.stale_rows, counts.sparse_rows) == (1, 1, 0, 0)


def test_every_step_s_tables_lie_where_the_first_s_do(setup):
    """A captured graph reads the tables of the step it is replayed in, so batches of all sizes start at one address."""
    places = set()
    for rows in range(1, SLOTS + 1):
        plan, _ = setup.prune(*(Row(slot, 5) for slot in range(rows)))
        strides = plan.page_table.stride(), plan.kept.stride()
        places.add((plan.page_table.data_ptr(), plan.kept.data_ptr(), *strides))
    assert len(places) == 1
    assert plan.page_table.data_ptr() == setup.tables.data_ptr()


# Selections of whole blocks


def test_tables_of_blocks_name_every_block_with_a_kept_token():
    """For executors that read whole blocks; what they read besides is counted as read."""
    setup = Setup("LBNHC")
    setup.pruner.operations = dataclasses.replace(
        setup.pruner.operations, build_page_tables=reference.build_block_tables, granularity="block"
    )
    setup.select(4, 17, {1, 2, 13}, {16})
    tables = torch.full((2, 8), STALE, dtype=torch.int32)
    tables[0, :5], tables[1, :2] = torch.tensor([9, 7, 5, 3, 1]), torch.tensor([2, 4])
    plan = setup.step([Row(4, 17, query=2), Row(1, 5, query=1)], tables)
    # Row 0 has 19 tokens, 3 of them in its last block, where the new ones are; row 1 reads its 6 tokens.
    assert plan.kept[..., 0].tolist() == [[4 + 4 + 3, 6], [3, 6]]
    assert plan.page_table[0, 0, 0, :3].tolist() == [9, 3, 1]
    assert plan.page_table[1, 0, 0, :1].tolist() == [1]
    assert plan.page_table[0, 1, 0, :2].tolist() == plan.page_table[1, 1, 0, :2].tolist() == [2, 4]
    counts = setup.counters.read()
    assert counts.kv_read == (2 * (11 + 6) + (3 + 6) + 2 * (19 + 6)) * HEADS
    assert counts.kv_full == 5 * (19 + 6) * HEADS


# Selections per head


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_a_selection_per_head_gets_a_table_per_head(layout):
    setup = Setup(layout, groups=HEADS)
    setup.select(4, 9, {0, 3, 8}, {1}, set(), {5, 6})
    plan, tokens = setup.prune(Row(4, 9, query=1), Row(3, 5, query=2))
    assert plan.kept.tolist() == [[[4, 2], [7, 7]], [[1, 3], [7, 7]]]
    assert [tokens[s, 0, h] for s in range(2) for h in range(2)] == [[0, 3, 8, 9], [1, 9], [9], [5, 6, 9]]
    assert all(tokens[s, 1, h] == [*range(7)] for s in range(2) for h in range(2))
    counts = setup.counters.read()
    assert counts.kv_full == (10 + 7) * HEADS * NUM_LAYERS
    # Source 0 serves two layers; two more read everything.
    assert counts.kv_read == 2 * (4 + 2 + 14) + (1 + 3 + 14) + 2 * (10 + 7) * HEADS


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_tables_through_maps_are_each_layer_s_own(layout):
    """Three tables of two sources, whose bits have three groups, for two heads."""
    setup, groups = Setup(layout, groups=HEADS), 3
    setup.store = SelectionStore(SOURCES, SLOTS, groups, MAX_LEN, CPU)
    tables = torch.full((5, SLOTS, HEADS, MAX_LEN + 5), -(2**30), dtype=torch.int32)
    layers = {"model.layers.1": 0, "model.layers.2": 1, "model.layers.4": 2}
    setup.pruner = Pruner(
        setup.store,
        executors.resolve("torch", CPU),
        setup.counters,
        layer_sources=layers,
        num_layers=NUM_LAYERS,
        num_kv_heads=HEADS,
        max_query_len=5,
        page_table=tables,
        maps=TableMaps.of([(0, (2, 0)), (1, (1, 1)), (0, (0, 1))], CPU),
    )
    setup.pruner.attach(BLOCK, lambda: page_strides(setup.cache))
    words = torch.tensor([[0b1, 0b110, 0b1000], [0b10000, 0b100000, 0b11]], dtype=torch.int32)
    setup.store.put(torch.tensor([4]), words.view(SOURCES, 1, groups, 1), torch.tensor([9], dtype=torch.int32))
    block_table = torch.tensor([[7, 3, 11], [8, 5, STALE]], dtype=torch.int32)
    plan = setup.step([Row(4, 9, query=1), Row(1, 5, query=2)], block_table)
    assert plan.layer_sources == layers
    kept = [[[3], [0]], [[5], [5]], [[0], [1, 2]]]
    assert plan.kept.tolist() == [[[len(head) + 1 for head in table], [7, 7]] for table in kept]
    block, head_stride, token = page_strides(setup.cache)
    for t, h in itertools.product(range(3), range(HEADS)):
        for r, positions in enumerate(([*kept[t][h], 9], range(7))):
            pages = [int(block_table[r, p // BLOCK]) * block + h * head_stride + p % BLOCK * token for p in positions]
            assert plan.page_table[t, r, h, : len(pages)].tolist() == pages
    assert (tables[3:] == -(2**30)).all()
    counts = setup.counters.read()
    assert counts.kv_full == (10 + 7) * HEADS * NUM_LAYERS
    assert counts.kv_read == int(plan.kept.sum()) + 2 * (10 + 7) * HEADS


# Buffers


def test_steps_of_different_sizes_do_not_see_each_other(setup):
    """The buffers are laid out anew for each number of rows, and `prune` of these tests poisons them in between."""
    rows = [Row(slot, 6 + slot, query=1 + slot % 3) for slot in range(SLOTS)]
    for slot, row in enumerate(rows):
        setup.select(slot, row.computed, {slot}, {0, 5})

    def wanted(row: Row) -> tuple[list[int], list[int]]:
        new = [*range(row.computed, row.length)]
        return [row.slot, *new], [0, 5, *new]

    for batch in (rows, rows[3:5], rows[:1], rows[1:], rows[::-1]):
        _, tokens = setup.prune(*batch)
        assert tokens == both_heads(*zip(*(wanted(row) for row in batch), strict=True))


def test_the_cache_is_looked_at_in_each_step(setup):
    """vLLM allocates the cache after the pruner is made, and may allocate it again in another layout."""
    setup.select(0, 6, {2}, {3})
    other = Setup("LBHNC" if page_strides(setup.cache)[1] == 1 else "LBNHC").cache
    for cache in (setup.cache, other):
        setup.cache = cache
        _, tokens = setup.prune(Row(0, 6, query=1))
        assert tokens == both_heads([[2, 6]], [[3, 6]])


def test_its_size_is_that_of_its_counts(setup):
    assert setup.pruner.nbytes == 4 * SOURCES * SLOTS

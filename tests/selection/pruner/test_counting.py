"""The pruner: its counters, and batches of a CUDA graph."""

from __future__ import annotations

import numpy as np
import torch

from specattn_vllm.stats import Counts

SLOTS = 6
FILL = -1  # the slot of rows that only fill a graph's batch


# Counters


def test_the_counters_equal_numbers_worked_out_by_hand(setup, row):
    setup.select(0, 9, {0, 3, 8}, {1})  # used: keeps 3 + 3 of 12 and 1 + 3 of 12
    setup.select(1, 7, {0}, {0})  # stale
    setup.prune(row(0, 9), row(1, 8, query=2), row(2, 5, query=1), row(3, 4, query=7, prefilling=True))
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


def test_rows_that_are_dense_on_purpose_are_counted_apart(setup, row):
    """On the host: nothing was selected for them, whatever their slots held."""
    setup.store.hold(0, exact=True)
    setup.store.note_small_batch(np.array([0, 1, 3]), True)
    setup.select(2, 9, {0}, {1})
    setup.prune(row(0, 9), row(1, 8, query=2), row(2, 9, query=1), row(3, 9, prefilling=True), row(FILL, 0, query=0))
    counts = setup.counters.read()
    assert (counts.verify_rows, counts.sparse_rows, counts.no_selection_rows) == (3, 1, 2)
    assert (counts.exact_rows, counts.small_batch_rows, counts.unselected_rows) == (1, 1, 0)
    setup.store.note_small_batch(np.array([1]), False)
    setup.prune(row(1, 8, query=2))
    counts = setup.counters.read()
    assert (counts.exact_rows, counts.small_batch_rows, counts.unselected_rows) == (1, 1, 1)


def test_the_counters_add_up_over_steps(setup, row):
    setup.select(0, 9, {0}, {1})
    setup.prune(row(0, 9, query=1))
    setup.prune(row(0, 10, query=1))
    counts = setup.counters.read()
    assert (counts.verify_rows, counts.sparse_rows, counts.stale_rows) == (2, 1, 1)
    assert counts.kv_read == 2 * (2 * 3 + 10 * 2) + 2 * 11 * 5
    assert counts.kv_full == 2 * (10 + 11) * 5


def test_a_step_that_warms_up_is_not_counted(setup, row):
    setup.prune(row(0, 8))
    before = setup.counters.read()
    commit, setup.counters.commit = setup.counters.commit, setup.counters.discard
    setup.prune(row(0, 8), row(1, 6, prefilling=True))
    setup.counters.commit = commit
    setup.counters.commit()
    assert setup.counters.read() == before != Counts()


# Batches of a CUDA graph


def test_rows_that_fill_a_graph_s_batch_keep_nothing_and_count_nothing(setup, row, new_setup, both_heads):
    setup.select(0, 9, {0, 3}, {1})
    rows = [row(0, 9), row(5, 4)]
    plan, tokens = setup.prune(*rows, row(FILL, 0, query=0), row(FILL, 0, query=0))
    assert tokens == both_heads([[0, 3, 9, 10, 11], range(7), [], []], [[1, 9, 10, 11], range(7), [], []])
    assert (plan.kept[:, 2:] == 0).all()
    assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (4, 6, 3)
    filled = setup.counters.read()
    other = new_setup(setup.layout)
    other.select(0, 9, {0, 3}, {1})
    other.prune(*rows)
    assert filled == other.counters.read()
    assert (filled.verify_rows, filled.sparse_rows, filled.no_selection_rows) == (2, 1, 1)


def test_rows_that_fill_a_batch_read_nothing_of_nobody_s_slot(setup, row):
    """Drafting leaves bits there too: those of the rows that filled its own batch."""
    setup.store.put(torch.tensor([FILL]), torch.full_like(setup.store.bits[:, :1], -1), torch.tensor([4]).int())
    before = setup.store.prefix_lens.clone()
    plan, _ = setup.prune(row(0, 9), row(FILL, 0, query=0))
    assert (plan.kept[:, 1] == 0).all()
    assert torch.equal(setup.store.prefix_lens, before)
    counts = setup.counters.read()
    assert (counts.verify_rows, counts.no_selection_rows, counts.stale_rows, counts.sparse_rows) == (1, 1, 0, 0)


def test_every_step_s_tables_lie_where_the_first_s_do(setup, row):
    """A captured graph reads the tables of the step it is replayed in, so batches of all sizes start at one address."""
    places = set()
    for rows in range(1, SLOTS + 1):
        plan, _ = setup.prune(*(row(slot, 5) for slot in range(rows)))
        strides = plan.page_table.stride(), plan.kept.stride()
        places.add((plan.page_table.data_ptr(), plan.kept.data_ptr(), *strides))
    assert len(places) == 1
    assert plan.page_table.data_ptr() == setup.tables.data_ptr()

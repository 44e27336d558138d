"""The pruner: which tokens each row of a step reads."""

from __future__ import annotations

import torch

from specattn_vllm.selection.pages import page_strides
from specattn_vllm.selection.store import NO_SELECTION
from specattn_vllm.stats import Counts

MAX_LEN, SLOTS, SOURCES = 30, 6, 2
LAYERS = {"model.layers.1": 0, "model.layers.2": 0, "model.layers.4": 1}


def test_rows_without_a_selection_keep_everything(setup, row, both_heads):
    plan, tokens = setup.prune(row(0, 8), row(3, 1, query=1), row(2, MAX_LEN - 3))
    everything = [range(11), range(2), range(MAX_LEN)]
    assert tokens == both_heads(everything, everything)
    assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (3, 7, 3)
    assert plan.layer_sources == LAYERS


def test_a_row_with_a_selection_keeps_it_and_the_new_tokens(setup, row, both_heads):
    setup.select(4, 9, {0, 3, 8}, {1})
    _, tokens = setup.prune(row(4, 9))
    assert tokens == both_heads([[0, 3, 8, 9, 10, 11]], [[1, 9, 10, 11]])


def test_bits_past_the_length_of_the_selection_say_nothing(setup, row, both_heads):
    setup.select(4, 9, {0, 25}, {1, 9})
    _, tokens = setup.prune(row(4, 9, query=1))
    assert tokens == both_heads([[0, 9]], [[1, 9]])


def test_an_empty_selection_leaves_the_new_tokens(setup, row, both_heads):
    setup.select(1, 6, set(), {5})
    _, tokens = setup.prune(row(1, 6, query=2))
    assert tokens == both_heads([[6, 7]], [[5, 6, 7]])


def test_each_row_gets_its_own(setup, row, both_heads):
    setup.select(5, 4, {0}, {1})
    setup.select(0, 20, {2, 19}, {3})
    setup.select(2, 8, {7}, {6})
    plan, tokens = setup.prune(row(2, 9), row(5, 4, query=1), row(1, 4, query=1), row(0, 20, query=2))
    # Slot 2 holds a selection for 8 tokens, and the row has computed 9: stale. Slot 1 never had one.
    assert tokens == both_heads(
        [range(12), [0, 4], range(5), [2, 19, 20, 21]],
        [range(12), [1, 4], range(5), [3, 20, 21]],
    )
    assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (4, 7, 3)


def test_a_selection_that_fills_the_model_length(setup, row, both_heads):
    setup.select(0, MAX_LEN - 1, set(range(0, MAX_LEN, 2)), {MAX_LEN - 2})
    _, tokens = setup.prune(row(0, MAX_LEN - 1, query=1))
    assert tokens == both_heads([[*range(0, MAX_LEN - 1, 2), MAX_LEN - 1]], [[MAX_LEN - 2, MAX_LEN - 1]])


def test_random_steps_agree_with_a_plain_oracle(setup, row, both_heads):
    rng = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    for _ in range(20):
        rows, wanted = [], [[], []]
        for slot in torch.randperm(SLOTS, generator=rng)[: number(1, SLOTS + 1)].tolist():
            one = row(slot, number(1, 20), query=number(1, 5))
            chosen = [{p for p in range(one.computed) if number(0, 2)} for _ in range(SOURCES)]
            fits = bool(number(0, 2))
            setup.select(slot, one.computed if fits else one.computed + 1, *chosen)
            for s in range(SOURCES):
                wanted[s].append([p for p in range(one.length) if not fits or p >= one.computed or p in chosen[s]])
            rows.append(one)
        _, tokens = setup.prune(*rows)
        assert tokens == both_heads(*wanted)


# Batches with prefills


def test_a_short_prefill_among_verifications_reads_everything(setup, row, both_heads):
    """vLLM sorts by length, so a chunk as short as a verification stands among them; it has no selection of its own."""
    for slot in range(4):
        setup.select(slot, 8, {0}, {1})
    plan, tokens = setup.prune(
        row(0, 8), row(1, 8, query=5, prefilling=True), row(2, 8, query=1), row(3, 8, query=6, prefilling=True)
    )
    assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (3, 9, 5)
    assert tokens == both_heads([[0, 8, 9, 10], range(13), [0, 8]], [[1, 8, 9, 10], range(13), [1, 8]])
    counts = setup.counters.read()
    assert (counts.verify_rows, counts.sparse_rows, counts.prefill_rows) == (2, 2, 2)
    # What the prefilling row read is nobody's verification: rows of 11 and 9 tokens, 2 heads, 5 layers.
    assert counts.kv_full == (11 + 9) * 2 * 5
    # The prefilling rows lost their selections, the others kept theirs.
    assert setup.store.prefix_lens[:4].tolist() == [8, NO_SELECTION, 8, NO_SELECTION]


def test_a_step_of_long_prefills_has_no_plan_and_clears_its_slots(setup, row, both_heads):
    setup.select(2, 10, {0}, {1})
    setup.select(3, 10, {0}, {1})
    assert setup.prune(row(2, 0, query=6, prefilling=True)) == (None, None)
    assert setup.counters.read() == Counts(prefill_rows=1)
    # Slot 2 has a new request. When it is as long as the old one was, it reads everything.
    _, tokens = setup.prune(row(2, 10, query=1), row(3, 10, query=1))
    assert tokens == both_heads([range(11), [0, 10]], [range(11), [1, 10]])


def test_short_rows_that_all_prefill_get_tables_too(setup, row, both_heads):
    """vLLM runs a prompt's last token through the graph of verifications, which reads the tables in any case."""
    setup.select(2, 10, {0}, {1})
    plan, tokens = setup.prune(row(2, 10, query=1, prefilling=True), row(4, 0, query=5, prefilling=True))
    assert tokens == both_heads([range(11), range(5)], [range(11), range(5)])
    assert (plan.num_rows, plan.num_tokens, plan.max_query_len) == (2, 6, 5)
    # Nothing was verified, so nothing was read in its place.
    assert setup.counters.read() == Counts(prefill_rows=2)
    assert setup.store.prefix_lens[2] == NO_SELECTION


def test_a_step_that_starts_with_a_long_prefill_has_no_plan(setup, row):
    """vLLM never sorts a step so; a row that stands behind reads everything."""
    assert setup.prune(row(2, 0, query=6, prefilling=True), row(3, 5)) == (None, None)
    assert setup.counters.read() == Counts(prefill_rows=1)


# Buffers


def test_steps_of_different_sizes_do_not_see_each_other(setup, row, both_heads):
    """The buffers are laid out anew for each number of rows, and `prune` of these tests poisons them in between."""
    rows = [row(slot, 6 + slot, query=1 + slot % 3) for slot in range(SLOTS)]
    for slot, row in enumerate(rows):
        setup.select(slot, row.computed, {slot}, {0, 5})

    def wanted(one) -> tuple[list[int], list[int]]:
        new = [*range(one.computed, one.length)]
        return [one.slot, *new], [0, 5, *new]

    for batch in (rows, rows[3:5], rows[:1], rows[1:], rows[::-1]):
        _, tokens = setup.prune(*batch)
        assert tokens == both_heads(*zip(*(wanted(row) for row in batch), strict=True))


def test_the_cache_is_looked_at_in_each_step(setup, row, new_setup, both_heads):
    """vLLM allocates the cache after the pruner is made, and may allocate it again in another layout."""
    setup.select(0, 6, {2}, {3})
    other = new_setup("LBHNC" if page_strides(setup.cache)[1] == 1 else "LBNHC").cache
    for cache in (setup.cache, other):
        setup.cache = cache
        _, tokens = setup.prune(row(0, 6, query=1))
        assert tokens == both_heads([[2, 6]], [[3, 6]])


def test_its_size_is_that_of_its_counts(setup):
    assert setup.pruner.nbytes == 4 * SOURCES * SLOTS

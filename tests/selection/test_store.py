"""The store: a selection is used by the request it was made for, at the length it was made for, or not at all."""

from __future__ import annotations

import random

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.selection.store import NO_SELECTION, SelectionStore

SOURCES, SLOTS, WORDS = 2, 4, 3
TORCH = executors.resolve("torch", torch.device("cpu"))


@pytest.fixture
def store():
    return SelectionStore(SOURCES, SLOTS, 1, 32 * WORDS - 1, torch.device("cpu"))


def put(store, lengths: dict[int, int], bits: int = 5) -> None:
    """Store a selection for {slot: length}."""
    store.put(
        torch.tensor(list(lengths), dtype=torch.int64),
        torch.full((SOURCES, len(lengths), 1, WORDS), bits, dtype=torch.int32),
        torch.tensor(list(lengths.values()), dtype=torch.int32),
    )


def take(store, rows: list[tuple[int, int, bool]]) -> tuple[list[int], list[int]]:
    """take for rows of (slot, computed, prefilling), which compute 1, 2, 3, ... tokens."""
    slots, computed, prefilling = zip(*rows, strict=True)
    query_lens = torch.arange(1, len(rows) + 1, dtype=torch.int32)
    usable, stored = store.take(
        TORCH,
        torch.tensor(slots, dtype=torch.int64),
        torch.cat((torch.zeros(1, dtype=torch.int32), query_lens.cumsum(0, dtype=torch.int32))),
        torch.tensor(computed, dtype=torch.int32) + query_lens,
        torch.tensor(prefilling, dtype=torch.bool),
    )
    assert usable.dtype == stored.dtype == torch.int32
    return usable.tolist(), stored.tolist()


def test_a_new_store_has_nothing(store):
    assert take(store, [(slot, length, False) for slot in range(SLOTS) for length in (0, 1)])[0] == [-1] * 2 * SLOTS


def test_a_token_more_than_a_word_gets_a_word():
    for tokens, words in ((1, 1), (32, 1), (33, 2), (64, 2)):
        assert SelectionStore(1, 1, 1, tokens, torch.device("cpu")).bits.shape == (1, 2, 1, words)


def test_a_selection_is_taken_at_its_own_length_only(store):
    put(store, {1: 10})
    assert take(store, [(1, 9, False)]) == ([NO_SELECTION], [10])
    assert take(store, [(1, 11, False)]) == ([NO_SELECTION], [10])
    # A stale selection stays: the row may have been scheduled without drafts for one step.
    assert take(store, [(1, 10, False)]) == ([10], [10])
    assert take(store, [(1, 10, False)]) == ([10], [10])


def test_rows_are_answered_in_batch_order(store):
    put(store, {3: 30, 0: 7, 2: 20})
    assert take(store, [(2, 20, False), (1, 20, False), (0, 8, False), (3, 30, False)]) == (
        [20, NO_SELECTION, NO_SELECTION, 30],
        [20, NO_SELECTION, 7, 30],
    )


def test_a_prefilling_row_gets_nothing_and_clears_its_slot(store):
    put(store, {1: 10, 2: 10})
    assert take(store, [(1, 10, True), (2, 10, False)]) == ([NO_SELECTION, 10], [10, 10])
    assert take(store, [(1, 10, False), (2, 10, False)]) == ([NO_SELECTION, 10], [NO_SELECTION, 10])


def test_a_reused_slot_does_not_hand_on_a_selection(store):
    put(store, {2: 10})  # request A, which ends here
    assert take(store, [(2, 0, True)])[0] == [NO_SELECTION]  # B prefills in A's slot ...
    assert take(store, [(2, 6, True)])[0] == [NO_SELECTION]
    assert take(store, [(2, 10, False)])[0] == [NO_SELECTION]  # ... and comes to be as long as A was


@pytest.mark.parametrize("length", [0, -1, -5])
def test_no_length_stores_no_selection(store, length):
    put(store, {1: 10, 3: 12})
    put(store, {1: length})
    assert take(store, [(1, c, False) for c in (10, 0, length)]) == ([NO_SELECTION] * 3, [NO_SELECTION] * 3)
    assert take(store, [(3, 12, False)])[0] == [12]


def test_putting_again_replaces(store):
    put(store, {1: 10}, bits=1)
    put(store, {1: 12}, bits=-2)
    assert take(store, [(1, 10, False)])[0] == [NO_SELECTION]
    assert take(store, [(1, 12, False)])[0] == [12]
    assert store.bits[:, 1].unique().tolist() == [-2]


def test_putting_touches_only_the_slots_named(store):
    put(store, {0: 4, 1: 5, 2: 6, 3: 7}, bits=9)
    put(store, {2: 8}, bits=3)
    assert store.prefix_lens[:SLOTS].tolist() == [4, 5, 8, 7]
    assert store.bits[0, :SLOTS, 0, 0].tolist() == [9, 9, 3, 9]


def test_rows_that_only_fill_a_batch_touch_nobody(store):
    """Their slot is -1, however many of them there are, and whatever came with them."""
    put(store, {slot: 10 + slot for slot in range(SLOTS)}, bits=9)
    store.put(
        torch.tensor([-1, 2, -1]),
        torch.full((SOURCES, 3, 1, WORDS), 3, dtype=torch.int32),
        torch.tensor([0, 8, 0], dtype=torch.int32),
    )
    assert store.prefix_lens[:SLOTS].tolist() == [10, 11, 8, 13]
    assert store.bits[0, :SLOTS, 0, 0].tolist() == [9, 9, 3, 9]
    # Neither do they get anything, whatever was put for them last.
    store.put(torch.tensor([-1]), torch.ones(SOURCES, 1, 1, WORDS).int(), torch.tensor([10], dtype=torch.int32))
    assert take(store, [(3, 13, False), (-1, 0, True), (-1, 10, False)])[0] == [13, NO_SELECTION, NO_SELECTION]
    assert take(store, [(slot, 10 + slot, False) for slot in (0, 1, 3)])[0] == [10, 11, 13]


def test_clearing_forgets_the_slots_named_and_no_others(store):
    put(store, {0: 4, 1: 5, 2: 6, 3: 7})
    store.clear(torch.tensor([2, 0]))
    assert take(store, [(0, 4, False), (1, 5, False), (2, 6, False), (3, 7, False)]) == (
        [NO_SELECTION, 5, NO_SELECTION, 7],
        [NO_SELECTION, 5, NO_SELECTION, 7],
    )
    store.clear(torch.tensor([-1]))
    assert take(store, [(1, 5, False), (3, 7, False)])[0] == [5, 7]


def test_a_cleared_slot_can_be_put_again(store):
    put(store, {1: 5}, bits=1)
    store.clear(torch.tensor([1]))
    put(store, {1: 6}, bits=2)
    assert take(store, [(1, 6, False)])[0] == [6]
    assert store.bits[:, 1].unique().tolist() == [2]


def test_what_is_put_may_be_overwritten_afterwards(store):
    # The capture hands out views of buffers that the next round reuses.
    bits = torch.full((SOURCES, 1, 1, WORDS), 6, dtype=torch.int32)
    lengths = torch.tensor([10], dtype=torch.int32)
    store.put(torch.tensor([1]), bits, lengths)
    bits.fill_(-1)
    lengths.fill_(99)
    assert take(store, [(1, 10, False)])[0] == [10]
    assert store.bits[:, 1].unique().tolist() == [6]


def test_its_size_is_that_of_its_tensors(store):
    # One slot is nobody's; 4 bytes a word and a length, one a flag.
    assert store.nbytes == 4 * SOURCES * (SLOTS + 1) * WORDS + 5 * (SLOTS + 1)


@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_calls_agrees_with_a_dictionary(seed):
    rng = random.Random(seed)
    slots, words = 6, 2
    store = SelectionStore(SOURCES, slots, 1, 32 * words, torch.device("cpu"))
    lengths: dict[int, int] = {}
    masks = {slot: [[0] * words] * SOURCES for slot in range(slots)}
    for _ in range(150):
        batch = rng.sample(range(slots), rng.randint(1, slots))
        if rng.random() < 0.1:
            store.clear(torch.tensor(batch))
            for slot in batch:
                lengths.pop(slot, None)
        elif rng.random() < 0.5:
            new = [rng.choice([0, 1, 2, 3]) for _ in batch]
            bits = torch.tensor([[[[rng.randint(-9, 9) for _ in range(words)]] for _ in batch] for _ in range(SOURCES)])
            store.put(torch.tensor(batch), bits.int(), torch.tensor(new, dtype=torch.int32))
            for row, (slot, length) in enumerate(zip(batch, new, strict=True)):
                masks[slot] = bits[:, row, 0].tolist()
                lengths.pop(slot, None)
                if length:
                    lengths[slot] = length
        else:
            rows = [(slot, rng.choice([0, 1, 2, 3]), rng.random() < 0.3) for slot in batch]
            usable, stored = take(store, rows)
            assert stored == [lengths.get(slot, NO_SELECTION) for slot in batch]
            for got, (slot, computed, prefilling) in zip(usable, rows, strict=True):
                fits = not prefilling and lengths.get(slot) == computed
                assert got == (computed if fits else NO_SELECTION)
                assert store.bits[:, slot, 0].tolist() == masks[slot]
                if prefilling:
                    lengths.pop(slot, None)

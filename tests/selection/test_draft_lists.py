"""Lists of what the draft reads: from whose choice each is made, and that what they save is counted."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.selection.draft_lists import DraftLists
from specattn_vllm.stats import Counters

CPU = torch.device("cpu")
LAYERS, SLOTS, MAX_LEN, HEADS, STEPS = 2, 4, 96, 3, 4
POISON = -(2**30)


class Setup:
    def __init__(self, recalls: bool = True) -> None:
        self.counters = Counters(CPU)
        self.positions = torch.full((LAYERS, SLOTS, MAX_LEN), POISON, dtype=torch.int32)
        self.lists = DraftLists(
            executors.resolve("torch", CPU),
            self.counters,
            self.positions,
            max_model_len=MAX_LEN,
            num_kv_heads=HEADS,
            recalls=recalls,
        )

    def begin(self, rows: dict[int, int], recall: bool = False) -> list:
        """Rows of {slot: keys of the sampled token}; the lists of step 0."""
        self.positions.fill_(POISON)
        self.lists._kept.fill_(77)
        slots, lens = torch.tensor([*rows]), torch.tensor([*rows.values()], dtype=torch.int32)
        self.lists.begin(slots, lens, recall=recall)
        return self.read() if recall else []

    def choose(self, *chosen: set[int]) -> list:
        """Choices of the rows, those of layer 1 one position further; the lists of later steps."""
        words = self.lists.bits.shape[-1]
        bits = torch.zeros(LAYERS, len(chosen), 1, words, dtype=torch.int32)
        for r, positions in enumerate(chosen):
            for layer in range(LAYERS):
                for p in positions:
                    assert (p + layer) % 32 < 31
                    bits[layer, r, 0, (p + layer) // 32] |= 1 << (p + layer) % 32
        self.lists.choose(bits, STEPS)
        return self.read()

    def read(self) -> list:
        """Lists of layer 0 by row, None for a row that reads everything; layer 1 has the same choices plus 1."""
        result = []
        for r, count in enumerate(self.lists.kept[0].tolist()):
            assert (self.lists.kept[1, r] == -1) == (count == -1)
            of = self.lists.of(0)
            result.append(None if count < 0 else of["positions"][r, :count].tolist())
            assert of["kept"][r] == count
        return result

    def drawn(self) -> tuple[int, int]:
        """Entries read and present since the last call, per layer and head."""
        counts = self.counters.read()
        self.counters.reset()
        assert counts.draft_kv_read % HEADS == 0
        return counts.draft_kv_read // HEADS, counts.draft_kv_full // (HEADS * LAYERS)


@pytest.mark.parametrize("recalls", [False, True])
def test_later_steps_read_the_choice_of_the_first(recalls):
    setup = Setup(recalls)
    setup.begin({2: 11, 0: 41, 3: 0, 1: 1})
    assert setup.choose({1, 4}, {0, 33}, set(), set()) == [[1, 4], [0, 33], None, None]


def test_a_later_round_recalls_the_choice_and_everything_since():
    setup = Setup()
    setup.begin({2: 11, 0: 41})
    setup.choose({1, 4}, {0, 33})
    # In another order, 3 and 5 tokens longer, and somebody whose choice was never made.
    assert setup.begin({0: 44, 1: 20, 2: 16}, recall=True) == [[0, 33, 40, 41, 42], None, [1, 4, 10, 11, 12, 13, 14]]
    # What is left of the list to choose from is not what is kept; who read everything has a choice of its own now.
    assert setup.choose({33}, {7}, {1}) == [[0, 33, 40, 41, 42], [7], [1, 4, 10, 11, 12, 13, 14]]
    assert setup.begin({1: 22, 2: 16}, recall=True) == [[7, 19, 20], [1, 4, 10, 11, 12, 13, 14]]
    # Until the next round that reads everything.
    setup.begin({1: 25, 2: 18})
    assert setup.choose({8, 9}, {0}) == [[8, 9], [0]]
    assert setup.begin({1: 26, 2: 20}, recall=True) == [[8, 9, 24], [0, 17, 18]]


def test_each_layer_recalls_its_own():
    setup = Setup()
    setup.begin({2: 11})
    setup.choose({1, 4})
    setup.begin({2: 13}, recall=True)
    assert setup.lists.of(1)["positions"][0, : setup.lists.kept[1, 0]].tolist() == [2, 5, 10, 11]


def test_a_request_in_a_reused_slot_recalls_nothing():
    setup = Setup()
    setup.begin({2: 11, 1: 11})
    setup.choose({1, 4}, {5})
    setup.lists.forget(2)
    assert setup.begin({2: 13, 1: 13}, recall=True) == [None, [5, 10, 11]]


@pytest.mark.parametrize("recall", [False, True])
def test_a_row_that_nothing_is_chosen_for_recalls_nothing(recall):
    """A prompt that goes on, a request that asked for exactness."""
    setup = Setup()
    setup.begin({2: 11, 1: 11})
    setup.choose({1, 4}, {5})
    setup.begin({2: 0, 1: 13}, recall=recall)
    assert setup.choose(set(), {6})[0] is None
    assert setup.begin({2: 15}, recall=True) == [None]


def test_rows_that_only_fill_a_batch_touch_nobody():
    setup = Setup()
    setup.begin({slot: 11 for slot in range(SLOTS)})
    setup.choose(*({slot} for slot in range(SLOTS)))
    for recall in (False, True):
        setup.lists.begin(torch.tensor([-1, -1]), torch.zeros(2, dtype=torch.int32), recall=recall)
        assert setup.choose({5}, {6}) == [None, None]
    lists = setup.begin({slot: 12 for slot in range(SLOTS)}, recall=True)
    assert lists == [[slot, 10] for slot in range(SLOTS)]


def test_what_is_read_and_what_is_there_are_counted():
    setup = Setup()
    setup.begin({2: 11, 0: 41, 3: 0})
    setup.choose({1, 4, 7}, {0}, set())
    newer = sum(range(STEPS))
    full = STEPS * (11 + 41) + 2 * newer
    # Step 0 reads everything; the others the list, the sampled token, and what is newer. Two layers.
    assert setup.drawn() == (2 * (11 + 41 + (STEPS - 1) * (4 + 2) + 2 * newer), full)
    setup.begin({2: 13, 1: 20}, recall=True)
    setup.choose({1}, {9, 3})
    # Slot 2 reads 3 of its 10 tokens, 2 since then and the sampled one in all steps; slot 1 everything once.
    assert setup.drawn() == (2 * (STEPS * (5 + 1) + 20 + (STEPS - 1) * (2 + 1) + 2 * newer), STEPS * 33 + 2 * newer)


def test_its_size_is_that_of_its_tensors():
    kept = 4 * LAYERS * SLOTS + 8 * SLOTS
    assert Setup(recalls=False).lists.nbytes == kept
    assert Setup().lists.nbytes == kept + 4 * LAYERS * (SLOTS + 1) * (MAX_LEN // 32) + 4 * (SLOTS + 1)

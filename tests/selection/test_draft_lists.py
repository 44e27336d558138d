"""Lists of what the draft reads: from whose choice each is made, and that what they save is counted."""

from __future__ import annotations

import torch

from specattn_vllm import executors
from specattn_vllm.selection.draft_lists import DraftLists
from specattn_vllm.stats import Counters

CPU = torch.device("cpu")
LAYERS, ROWS, MAX_LEN, HEADS, STEPS = 2, 4, 96, 3, 4
POISON = -(2**30)


class Setup:
    def __init__(self) -> None:
        self.counters = Counters(CPU)
        self.positions = torch.empty((LAYERS, ROWS, MAX_LEN), dtype=torch.int32)
        operations = executors.resolve("torch", CPU)
        self.lists = DraftLists(operations, self.counters, self.positions, num_kv_heads=HEADS)

    def begin(self, *lens: int) -> None:
        """Rows by the keys of their sampled tokens."""
        self.positions.fill_(POISON)
        self.lists._kept.fill_(77)
        self.lists.begin(torch.tensor(lens, dtype=torch.int32))

    def choose(self, *chosen: set[int]) -> list:
        """Choices of the rows, those of layer 1 one position further; the lists of later steps."""
        bits = torch.zeros(LAYERS, len(chosen), 1, MAX_LEN // 32, dtype=torch.int32)
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


def test_later_steps_read_the_choice_of_the_first():
    setup = Setup()
    for _ in range(2):  # nothing of a round is left in the next
        setup.begin(11, 41, 0, 1)
        assert setup.choose({1, 4}, {0, 33}, set(), set()) == [[1, 4], [0, 33], None, None]
        setup.begin(7, 13)
        assert setup.choose({2}, {0, 9}) == [[2], [0, 9]]


def test_each_layer_reads_its_own():
    setup = Setup()
    setup.begin(11)
    setup.choose({1, 4})
    assert setup.lists.of(1)["positions"][0, : setup.lists.kept[1, 0]].tolist() == [2, 5]


def test_what_is_read_and_what_is_there_are_counted():
    setup = Setup()
    setup.begin(11, 41, 0)
    setup.choose({1, 4, 7}, {0}, set())
    newer = sum(range(STEPS))
    full = STEPS * (11 + 41) + 2 * newer
    # Step 0 reads everything; the others the list, the sampled token, and what is newer. Two layers.
    assert setup.drawn() == (2 * (11 + 41 + (STEPS - 1) * (4 + 2) + 2 * newer), full)
    # A context of one token has no list.
    setup.begin(1)
    setup.choose(set())
    assert setup.drawn() == (2 * (STEPS + newer), STEPS + newer)


def test_its_size_is_that_of_its_tensors():
    assert Setup().lists.nbytes == 4 * LAYERS * ROWS + 8 * ROWS

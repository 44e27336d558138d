"""Method 'fused' in whole engines: as much as the target's own attention asks for, of what the draft attended to."""

from __future__ import annotations

import math

import pytest
import torch

pytestmark = pytest.mark.engine

LENGTHS = [5, 129, 300, 700, 1300, 2500]
OPTIONS = {"method": "fused", "min_tokens": 16, "recent_tokens": 16}


def test_of_everything_the_tokens_are_those_of_plain_decoding(plain, engine, greedy, prompts, counts):
    expected = plain(prompts(LENGTHS), 24)
    llm = engine({**OPTIONS, "size_factor": 1e6})
    assert greedy(llm, prompts(LENGTHS), 24) == expected
    seen = counts(llm)
    # A request's first verification has no sizes to go by.
    assert seen.no_selection_rows == len(LENGTHS) and seen.stale_rows == 0
    assert seen.sparse_rows == seen.verify_rows - len(LENGTHS) > 20
    assert seen.kv_read == seen.kv_full


class Oracle:
    """Chooses anew in plain Python what `Sizes` chooses, and follows whose sizes they are."""

    def __init__(self, monkeypatch, owner: dict[int, str]) -> None:
        from specattn_vllm.selection.sizes import Sizes

        self.owner, self.learned, self.selected = owner, {}, 0
        self.sizes: dict[int, list[list[int]]] = {}
        learn, select = Sizes.learn, Sizes.select

        def watch_learn(made, slots):
            target = made.target
            for row, slot in enumerate(slots.tolist()):
                length = int(target.lens[row])
                if length:
                    mass = target.mass[row, ..., :length]
                    self.sizes[slot] = [[_count(head.tolist()) for head in layer] for layer in mass]
                    self.learned[slot] = self.owner[slot]
            learn(made, slots)

        def watch_select(made, mass, slots, lens):
            bits, ranked = select(made, mass, slots, lens)
            maps = [*zip(made.maps.sources.tolist(), made.maps.groups.tolist(), strict=True)]
            for row, (slot, length) in enumerate(zip(slots.tolist(), ranked.tolist(), strict=True)):
                if not length:
                    continue
                assert self.learned[slot] == self.owner[slot], "the sizes are another request's"
                for t, (source, groups) in enumerate(maps):
                    for h, group in enumerate(groups):
                        wanted = _heaviest(mass[source, row, group, :length].tolist(), self.sizes[slot][t][h])
                        assert _tokens(bits[t, row, h]) == wanted
                        self.selected += 1
            return bits, ranked

        monkeypatch.setattr(Sizes, "learn", watch_learn)
        monkeypatch.setattr(Sizes, "select", watch_select)


def _order(mass: list[float]) -> tuple[list[int], list[int], int]:
    quanta, n = [int(m * 2**30) for m in mass], len(mass)
    forced = [p for p in range(n) if p < 4 or p >= n - 16]
    rest = sorted(set(range(n)) - set(forced), key=lambda p: (quanta[p], p), reverse=True)
    return quanta, forced + rest, len(forced)


def _count(mass: list[float]) -> int:
    """Tokens that hold 0.9 of the mass, those that are always kept included."""
    quanta, order, count = _order(mass)
    goal, held = (sum(quanta) * round(0.9 * 65536) + 65535) // 65536, sum(quanta[p] for p in order[:count])
    while held < goal:
        held += quanta[order[count]]
        count += 1
    return count


def _heaviest(mass: list[float], size: int) -> set[int]:
    _, order, forced = _order(mass)
    return set(order[: max(math.ceil(size * 0.75), 16, forced)])


def _tokens(bits: torch.Tensor) -> set[int]:
    return {32 * w + b for w, word in enumerate(bits.tolist()) for b in range(32) if word >> b & 1}


RULES = {**OPTIONS, "size_top_p": 0.9, "size_factor": 0.75, "refresh_every": 3}


def test_page_tables_hold_what_plain_python_chooses(engine, greedy, prompts, monkeypatch, audit, counts):
    """With refreshes, among requests that come and go. That tables are made of what was chosen, `audit` checks."""
    oracle = Oracle(monkeypatch, audit.owner)
    llm = engine(RULES, max_num_seqs=3, max_num_batched_tokens=512)
    greedy(llm, prompts([700, 40, 1100, 130, 300]), 24)
    assert oracle.selected > 100
    seen = counts(llm)
    assert seen.refresh_rows > 0 and seen.no_selection_rows == 5
    assert seen.sparse_rows == seen.verify_rows - seen.refresh_rows - 5
    assert 0.1 < seen.kv_fraction < 0.9


def test_preempted_requests_come_back_without_sizes(small_pool, engine, greedy, prompts, monkeypatch, audit, counts):
    """In another slot, or in one in which another request has learned in the meantime."""
    Oracle(monkeypatch, audit.owner)
    llm = engine(RULES, **small_pool.arguments)
    greedy(llm, prompts(small_pool.lengths), 48)
    assert audit.preemptions > 0
    # One that is preempted again before its first verification has had no time to read everything.
    assert counts(llm).no_selection_rows > 4
    assert sum(audit.sparse_rows.values()) > 20

"""Method 'fused' in whole engines: as much as the target's own attention asks for, of what the draft attended to."""

from __future__ import annotations

import math
import struct

import pytest
import torch

pytestmark = pytest.mark.engine

LENGTHS = [5, 129, 300, 700, 1300, 2500]
OPTIONS = {"method": "fused", "min_tokens": 16, "recent_tokens": 16, "size_rounds": 2}


def test_of_everything_the_tokens_are_those_of_plain_decoding(plain, engine, greedy, prompts, counts):
    expected = plain(prompts(LENGTHS), 24)
    llm = engine({**OPTIONS, "size_factor": 1e6})
    assert greedy(llm, prompts(LENGTHS), 24) == expected
    seen = counts(llm)
    # The first verifications of a request are there to go by.
    assert seen.no_selection_rows == 2 * len(LENGTHS) and seen.stale_rows == 0
    assert seen.sparse_rows == seen.verify_rows - 2 * len(LENGTHS) > 20
    assert seen.kv_read == seen.kv_full


class Oracle:
    """Chooses anew in plain Python what `Sizes` chooses, and follows whose shares they are, and of which round."""

    def __init__(self, monkeypatch, owner: dict[int, str]) -> None:
        from vllm.v1.worker.gpu.states import RequestState

        from specattn_vllm.selection.sizes import Sizes

        self.owner, self.selected, self.learned = owner, 0, 0
        # By request: its mass in the last round, and the shares of each verification that it read everything in.
        self.drafted: dict[str, torch.Tensor] = {}
        self.shares: dict[str, list[list[list[float]]]] = {}
        self.history: dict[str, torch.Tensor] = {}
        learn, select, add_request = Sizes.learn, Sizes.select, RequestState.add_request

        def watch_learn(made, slots, ranking):
            target = made.target
            for row, slot in enumerate(slots.tolist()):
                length = int(target.lens[row]) - 1
                if length <= 0:
                    continue
                drafted = self.drafted[self.owner[slot]]
                assert drafted.shape[-1] == length, "the verification is not of what was drafted last"
                mass = target.mass[row, ..., :length]
                shares = [
                    [_share(mass[t, h].tolist(), drafted[source, group].tolist()) for h, group in enumerate(groups)]
                    for t, (source, groups) in enumerate(self.maps(made))
                ]
                self.shares.setdefault(self.owner[slot], []).append(shares)
                self.history[self.owner[slot]] = target.mass[row, ..., : length + 1].mean(1).bfloat16().float()
                self.learned += 1
            learn(made, slots, ranking)

        def watch_select(made, mass, slots, lens):
            bits, ranked = select(made, mass, slots, lens)
            for row, (slot, length) in enumerate(zip(slots.tolist(), lens.tolist(), strict=True)):
                if not length:
                    continue
                self.drafted[self.owner[slot]] = mass[:, row, :, :length].clone()
                shares = self.shares.get(self.owner[slot], [])
                assert int(made.counts[slot]) == len(shares), "the sizes are another request's"
                assert int(ranked[row]) == (length if len(shares) >= 2 else 0)
                if not int(ranked[row]):
                    continue
                history = self.history[self.owner[slot]]
                for t, (source, groups) in enumerate(self.maps(made)):
                    for h, group in enumerate(groups):
                        both = mass[source, row, group, :length].clone()
                        both[: history.shape[1]] += 0.1 * history[t]
                        share = (sum(known[t][h] for known in shares) + 2 * 0.1) / (len(shares) + 2)
                        wanted = _heaviest(both.tolist(), share)
                        assert len(_tokens(bits[t, row, h]) ^ wanted) <= 1  # a share may end on a whole token
                        self.selected += 1
            return bits, ranked

        def watch_add(states, req_id, *args, **kwargs):
            # A new request, or one that was preempted and begins anew.
            self.shares.pop(req_id, None)
            self.history.pop(req_id, None)
            return add_request(states, req_id, *args, **kwargs)

        monkeypatch.setattr(RequestState, "add_request", watch_add)
        monkeypatch.setattr(Sizes, "learn", watch_learn)
        monkeypatch.setattr(Sizes, "select", watch_select)

    def maps(self, made) -> list[tuple[int, list[int]]]:
        return [*zip(made.maps.sources.tolist(), made.maps.groups.tolist(), strict=True)]


def _forced(length: int) -> set[int]:
    return {p for p in range(length) if p < 4 or p >= length - 16}


def _share(mass: list[float], ranks: list[float]) -> float:
    """Share of the context that holds 0.9 of the mass: what is always kept, then by rank, in 8 bits of it."""
    quanta, taken = [int(m * 2**30) for m in mass], _forced(len(mass))
    keys = [struct.unpack("<I", struct.pack("<f", rank))[0] >> 16 for rank in ranks]
    goal, held = (sum(quanta) * round(0.9 * 65536) + 65535) // 65536, sum(quanta[p] for p in taken)
    by_key: dict[int, list[int]] = {}
    for p in {*range(len(mass))} - taken:
        by_key.setdefault(keys[p], []).append(p)
    for key in sorted(by_key, reverse=True):
        if held >= goal:
            break
        taken |= {*by_key[key]}
        held += sum(quanta[p] for p in by_key[key])
    return len(taken) / len(mass)


def _heaviest(mass: list[float], share: float) -> set[int]:
    quanta, forced = [int(m * 2**30) for m in mass], _forced(len(mass))
    rest = sorted({*range(len(mass))} - forced, key=lambda p: (quanta[p], p), reverse=True)
    size = max(math.ceil(share * 0.75 * len(mass)), 16, len(forced))
    return forced | {*rest[: size - len(forced)]}


def _tokens(bits: torch.Tensor) -> set[int]:
    return {32 * w + b for w, word in enumerate(bits.tolist()) for b in range(32) if word >> b & 1}


RULES = {**OPTIONS, "size_top_p": 0.9, "history_weight": 0.1, "size_factor": 0.75, "refresh_every": 3}


def test_page_tables_hold_what_plain_python_chooses(engine, greedy, prompts, monkeypatch, audit, counts):
    """With refreshes, among requests that come and go. That tables are made of what was chosen, `audit` checks."""
    oracle = Oracle(monkeypatch, audit.owner)
    llm = engine(RULES, max_num_seqs=3, max_num_batched_tokens=512)
    greedy(llm, prompts([700, 40, 1100, 130, 300]), 24)
    assert oracle.selected > 100
    seen = counts(llm)
    assert seen.refresh_rows > 0 and seen.no_selection_rows == 10
    assert seen.sparse_rows == seen.verify_rows - seen.refresh_rows - 10
    assert oracle.learned == seen.refresh_rows + 10
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

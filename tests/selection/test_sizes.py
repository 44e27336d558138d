"""Sizes by request slot: whose attention they come from, when they are forgotten, and what is chosen by them."""

from __future__ import annotations

import math
import os
import struct

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.kernels.reference import unpack_bits
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.pruner import TableMaps
from specattn_vllm.selection.ranking import Ranking
from specattn_vllm.selection.sizes import Sizes

CPU = torch.device("cpu")
REQUESTS, WIDTH, QUERY = 4, 96, 3
SOURCES, DRAFT_HEADS = 2, 3
MADE_FROM = [(1, (0, 2)), (0, (1, 1)), (1, (0, 2))]  # three target layers of two KV heads
TABLES, HEADS = 3, 2
BASE = {"method": "fused", "min_tokens": 0, "sink_tokens": 1, "recent_tokens": 2, "size_rounds": 1}
BASE |= {"history_weight": 0.0}


class Setup:
    """Sizes of an engine without one: mass is put where steps of the target and rounds of the draft leave it."""

    def __init__(self, executor: str = "torch", seed: int = 0, **changes) -> None:
        self.options = SpecAttnOptions(**BASE | changes)
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = Sizes.of(
            self.options, executors.resolve(executor, CPU), TableMaps.of(MADE_FROM, CPU), max_num_reqs=REQUESTS,
            layer_sources={f"layer {t}": t for t in range(TABLES)}, num_heads=4, max_query_len=QUERY,
            max_model_len=WIDTH, device=CPU,
        )  # fmt: skip
        self.sizes.target.bits.fill_(-1)
        self.ranking = Ranking(SOURCES, DRAFT_HEADS, REQUESTS, WIDTH, CPU)
        self.ranking.begin(REQUESTS)
        self.ranking.mass.fill_(torch.nan)

    def masses(self, *shape: int, sharpness: float = 3.0) -> torch.Tensor:
        logits = sharpness * torch.randn(*shape, WIDTH, generator=self.generator)
        return logits.softmax(-1)

    def draft(self, of: dict[int, int]) -> torch.Tensor:
        """A round of requests in slots, of which so many tokens are ranked; 0: nothing is chosen. Returns the mass."""
        self.ranking.begin(len(of))
        mass = self.ranking.mass
        mass.copy_(self.masses(SOURCES, len(of), DRAFT_HEADS))
        for r, n in enumerate(of.values()):
            mass[:, r, :, n:] = torch.nan
        self.bits, self.ranked = self.sizes.select(mass, slots(*of), ints([*of.values()]))
        return mass.clone()

    def verify(self, of: dict[int, int]) -> torch.Tensor:
        """A step of the target in which requests in slots left mass on so many tokens, the first of the step's own
        included; 0: the row read a selection. Returns the mass."""
        target = self.sizes.target
        mass = self.masses(len(of), TABLES, HEADS)
        for r, n in enumerate(of.values()):
            mass[r, ..., n:] = torch.nan  # left by another step
        target.mass[: len(of)] = mass
        target.lens.zero_()
        target.lens[: len(of)] = ints([*of.values()])
        self.ranking.begin(len(of))  # the round that is about to be drafted
        self.sizes.learn(slots(*of), self.ranking)
        return mass


def in_order(mass: list[float], options: SpecAttnOptions) -> tuple[list[int], int]:
    """Positions in the order in which they are taken, and how many of them are taken whatever they hold."""
    n = len(mass)
    forced = [p for p in range(n) if p < options.sink_tokens or p >= n - options.recent_tokens]
    quanta = [int(m * 2**30) for m in mass]
    rest = sorted(set(range(n)) - set(forced), key=lambda p: (quanta[p], p), reverse=True)
    return forced + rest, len(forced)


def share_of(mass: list[float], ranks: list[float], options: SpecAttnOptions) -> float:
    """Share of the context that has to be kept, forced positions first and then by rank, for `size_top_p` of the mass;
    ranks are compared in 8 bits, and those that tie are kept together."""
    n = len(mass)
    keys = [struct.unpack("<I", struct.pack("<f", rank))[0] >> 16 for rank in ranks]
    quanta = [int(m * 2**30) for m in mass]
    taken = {p for p in range(n) if p < options.sink_tokens or p >= n - options.recent_tokens}
    for key in sorted({*keys}, reverse=True):
        if sum(quanta[p] for p in taken) * 65536 >= sum(quanta) * round(options.size_top_p * 65536):
            break
        taken |= {p for p in range(n) if keys[p] == key}
    return len(taken) / n


def chosen(mass: list[float], share: float, options: SpecAttnOptions) -> set[int]:
    order, forced = in_order(mass, options)
    size = math.ceil(share * options.size_factor * len(mass))
    cap = math.ceil(len(mass) * round(options.max_fraction * 65536) / 65536)
    cap = min(max(cap, options.min_tokens), len(mass) if options.max_tokens is None else options.max_tokens)
    count = max(min(size, cap), min(options.min_tokens, cap), forced)
    return set(order[:count])


def ints(values: list[int], dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def slots(*values: int) -> torch.Tensor:
    return ints([*values], torch.int64)


def test_shares_are_those_of_plain_python_and_go_to_the_rows_slots():
    """Of another round than this one, with more rows in another order."""
    setup = Setup()
    sizes = setup.sizes
    drafted = setup.draft({3: 50, 1: 32, 0: 60, 2: 89})
    mass = setup.verify({2: 90, 0: 0, 1: 33})
    for r, slot, then in ((0, 2, 3), (2, 1, 1)):
        n = (89, 0, 32)[r]
        for t, (source, groups) in enumerate(MADE_FROM):
            for h, group in enumerate(groups):
                ranks = drafted[source, then, group, :n].tolist()
                wanted = share_of(mass[r, t, h, :n].tolist(), ranks, setup.options)
                assert float(sizes.shares[slot, t, h]) == pytest.approx(wanted, abs=1e-6)
    assert sizes.counts[:REQUESTS].tolist() == [0, 1, 1, 0]
    assert len({*sizes.shares[1:3].flatten().tolist()}) > 6, "layers and heads differ"
    # A row that read a selection keeps what it had, and nobody else's slot is touched.
    assert not sizes.shares[0].any() and not sizes.shares[3].any()


def test_rows_that_only_fill_a_batch_are_nobody():
    setup = Setup()
    setup.draft({3: 49, -1: 0})
    setup.verify({3: 50, -1: 0})
    assert setup.sizes.counts[:REQUESTS].tolist() == [0, 0, 0, 1]
    assert not setup.sizes.shares[:3].any()


@pytest.mark.parametrize("drafted", [{}, {2: 49}, {1: 48}, {1: 0}], ids=str)
def test_a_verification_whose_tokens_another_round_drafted_teaches_nothing(drafted):
    """None was drafted, the slot was not in it, tokens were added since, or nothing was ranked."""
    setup = Setup()
    if drafted:
        setup.draft(drafted)
    setup.verify({1: 50})
    assert not setup.sizes.counts.any() and not setup.sizes.shares.any()


def test_shares_add_up():
    setup = Setup()
    total = 0
    for round_ in range(3):
        setup.draft({1: 40 + round_})
        before = setup.sizes.shares[1].clone()
        setup.verify({1: 41 + round_})
        total = total + (setup.sizes.shares[1] - before)
        assert (setup.sizes.shares[1] > before).all()
        # Rounds that read selections leave them alone.
        setup.draft({1: 41 + round_})
        setup.verify({1: 0})
    assert setup.sizes.counts[1] == 3
    torch.testing.assert_close(setup.sizes.shares[1], total)


def begin(setup: Setup, rows: int, **changes) -> None:
    """A step of a verification of 3 tokens, one of 1, a prompt's last 2 tokens, a filled-up row and a prompt of 9."""
    step = {
        "slots": slots(2, 0, 3, -1, 1),
        "prefilling": torch.tensor([False, False, True, False, True]),
        "reads_everything": torch.tensor([True, False, True, True, True]),
        "query_start_loc": ints([0, 3, 4, 6, 9, 18]),
        "seq_lens": ints([40, 21, 30, 0, 9]),
    }
    setup.sizes.begin(**{**step, **changes}, rows=rows)


def test_only_verifications_that_read_everything_are_watched():
    setup = Setup()
    begin(setup, rows=4)
    target = setup.sizes.target
    assert target.scored_rows.tolist() == [[0, 2], [-1, -1], [-1, -1], [-1, -1]]
    assert target.lens.tolist() == [38, 0, 0, 0]
    begin(setup, rows=4, reads_everything=torch.tensor([False, True, True, True, True]))
    assert target.scored_rows.tolist() == [[-1, -1], [3, 3], [-1, -1], [-1, -1]]
    assert target.lens.tolist() == [0, 21, 0, 0]
    # A step of prompts alone.
    begin(setup, rows=0)
    assert target.scored_rows.tolist() == [[-1, -1]] * 4 and not target.lens.any()


def test_a_row_that_prefills_clears_its_slot():
    """All of them, long prompts too: each new or resumed request starts with one."""
    setup = Setup()
    for kept in (setup.sizes.shares, setup.sizes.counts, setup.sizes.drafted):
        kept.fill_(5)
    begin(setup, rows=4)
    for kept in (setup.sizes.shares, setup.sizes.counts, setup.sizes.drafted):
        assert [bool(kept[slot].any()) for slot in range(4)] == [True, False, True, False]


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_first_verifications_read_everything(rounds):
    setup = Setup(size_rounds=rounds)
    for known in range(4):
        setup.draft({2: 30 + known})
        assert setup.ranked.tolist() == [30 + known if known >= rounds else 0]
        setup.verify({2: 31 + known})


CHANGES = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size_factor": 1.7},
        {"size_factor": 0.01},
        {"size_factor": 1e300},
        {"min_tokens": 25},
        {"max_tokens": 12},
        {"max_fraction": 0.1},
        {"rule": "top_p", "ratio": 0.5},
    ],
    ids=str,
)


@CHANGES
@pytest.mark.parametrize("executor", ["torch", "triton"])
def test_each_head_reads_as_much_as_its_size_of_what_its_draft_head_attended_to(executor, changes):
    """The rule is the draft's own, and says nothing here."""
    if executor == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1, set from the start")
    setup = Setup(executor, **changes)
    sizes, options, of = setup.sizes, setup.options, {1: 80, 3: 61, 0: 0, 2: 33}
    sizes.counts[:] = ints([2, 1, 0, 3, 0])  # slot 2 has not yet read everything
    sizes.shares.copy_(torch.rand(sizes.shares.shape, generator=setup.generator) * sizes.counts.view(-1, 1, 1) / 2)
    mass = setup.draft(of)
    assert setup.bits.shape == (TABLES, 4, HEADS, WIDTH // 32)
    assert setup.ranked.tolist() == [80, 61, 0, 0]
    for t, (source, groups) in enumerate(MADE_FROM):
        for h, group in enumerate(groups):
            for r, (slot, n) in enumerate(zip(of, setup.ranked.tolist(), strict=True)):
                row = mass[source, r, group, :n].tolist()
                # The ratio is worth two measurements.
                share = (float(sizes.shares[slot, t, h]) + 2 * options.ratio_or_default) / (int(sizes.counts[slot]) + 2)
                wanted = chosen(row, share, options) if n else set()
                assert set(unpack_bits(setup.bits[t, r, h], WIDTH).nonzero().flatten().tolist()) == wanted


def history_of(mass: torch.Tensor, dilation: int) -> torch.Tensor:
    """[T, length] of mass [T, H, length]: of each position the most of itself and those before it, in 16 bits."""
    length = mass.shape[-1]
    spread = [mass[..., max(p - dilation, 0) : p + 1].amax(-1) for p in range(length)]
    return torch.stack(spread, -1).mean(1).bfloat16().float()


@pytest.mark.parametrize("dilation", [0, 3])
@pytest.mark.parametrize("executor", ["torch", "triton"])
def test_what_the_target_last_attended_to_counts_too(executor, dilation):
    """That of the request's last verification that read everything, as far as it went, in whatever row it is now."""
    if executor == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1, set from the start")
    weight = 0.2
    setup = Setup(executor, history_weight=weight, dilation=dilation, rule="top_k", ratio=0.3)
    setup.draft({3: 40, 1: 60})
    known = setup.verify({3: 41, 1: 61})
    setup.draft({1: 62, 3: 43, 0: 20})
    # One reads everything again, one a selection.
    newer = setup.verify({0: 21, 3: 0, 1: 63})
    of = {1: 64, 3: 47, 0: 25}
    mass = setup.draft(of)
    past = {1: newer[2, ..., :63], 3: known[0, ..., :41], 0: newer[0, ..., :21]}
    assert setup.ranked.tolist() == [*of.values()]
    moved = 0
    for t, (source, groups) in enumerate(MADE_FROM):
        for h, group in enumerate(groups):
            for r, (slot, n) in enumerate(of.items()):
                row, history = mass[source, r, group, :n], history_of(past[slot], dilation)[t]
                both = row.clone()
                both[: len(history)] += weight * history
                found = set(unpack_bits(setup.bits[t, r, h], WIDTH).nonzero().flatten().tolist())
                # The interpreter cuts off where torch rounds, so the last of the chosen may be another.
                assert len(found ^ chosen(both.tolist(), 0.3, setup.options)) <= (0 if executor == "torch" else 2)
                moved += found != chosen(row.tolist(), 0.3, setup.options)
    assert moved > 9, "the history changes nothing"


def test_a_new_request_has_no_history():
    setup = Setup(history_weight=0.5, rule="top_k", ratio=0.3, size_rounds=0)
    for _ in range(2):
        setup.draft({2: 40, 0: 50})
        setup.verify({2: 41, 0: 51})
    assert setup.sizes.history.lens[:REQUESTS].tolist() == [51, 0, 41, 0]
    begin(setup, rows=4, prefilling=torch.tensor([True, False, True, False, True]))
    assert setup.sizes.history.lens[:REQUESTS].tolist() == [51, 0, 0, 0]
    mass = setup.draft({2: 30})
    for t, (source, groups) in enumerate(MADE_FROM):
        for h, group in enumerate(groups):
            wanted = chosen(mass[source, 0, group, :30].tolist(), 0.3, setup.options)
            assert set(unpack_bits(setup.bits[t, 0, h], WIDTH).nonzero().flatten().tolist()) == wanted


def test_sums_stay_below_what_the_choice_can_count():
    """The most that options allow, of masses that sum to 1."""
    setup = Setup(history_weight=0.198, dilation=4, rule="top_k", ratio=0.3)
    setup.draft({1: 60})
    setup.sizes.target.mass[0, ..., :61] = 0.0
    setup.sizes.target.mass[0, ..., 1:61:5] = 1 / 12
    setup.sizes.target.lens[0] = 61
    setup.sizes.learn(slots(1), setup.ranking)
    setup.draft({1: 61})
    both = setup.sizes.target.mass.view(-1)[: TABLES * HEADS * WIDTH].view(TABLES, HEADS, WIDTH)[..., :61]
    assert 1.5 < float(both.sum(-1).max()) < 2


def test_its_size_is_that_of_its_buffers():
    sizes, weighed = Setup().sizes, Setup(history_weight=0.1).sizes
    masses, heads = REQUESTS * TABLES * HEADS, TABLES * HEADS
    scored = REQUESTS * 2 * 4
    assert sizes.nbytes["scores"] == 4 * scored * WIDTH
    assert sizes.nbytes["mass"] == 4 * (masses * WIDTH + scored + REQUESTS + REQUESTS + 1) + 8 * 2 * REQUESTS
    assert (
        sizes.nbytes["bitmasks"]
        == 4 * masses * (WIDTH // 32 + 1) + (REQUESTS + 1) * (4 * heads + 4 + 8 * 3) + 8 * REQUESTS
    )
    assert sizes.history is None and sizes.nbytes["history"] == 0
    assert weighed.nbytes == sizes.nbytes | {"history": (REQUESTS + 1) * (2 * TABLES * WIDTH + 4) + 8 * TABLES}

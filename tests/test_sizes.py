"""Sizes by request slot: whose attention they come from, when they are forgotten, and what is chosen by them."""

from __future__ import annotations

import math
import os

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.kernels.reference import unpack_bits
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.pruner import TableMaps
from specattn_vllm.selection.sizes import Sizes

CPU = torch.device("cpu")
REQUESTS, WIDTH, QUERY = 4, 96, 3
SOURCES, DRAFT_HEADS = 2, 3
MADE_FROM = [(1, (0, 2)), (0, (1, 1)), (1, (0, 2))]  # three target layers of two KV heads
TABLES, HEADS = 3, 2
BASE = {"method": "fused", "size_top_p": 0.8, "min_tokens": 0, "sink_tokens": 1, "recent_tokens": 2}


class Setup:
    """Sizes of an engine without one: the target's mass is put where its steps leave it."""

    def __init__(self, executor: str = "torch", seed: int = 0, **changes) -> None:
        self.options = SpecAttnOptions(**BASE | changes)
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = Sizes.of(
            self.options, executors.resolve(executor, CPU), TableMaps.of(MADE_FROM, CPU), max_num_reqs=REQUESTS,
            layer_sources={f"layer {t}": t for t in range(TABLES)}, num_heads=4, max_query_len=QUERY,
            max_model_len=WIDTH, device=CPU,
        )  # fmt: skip
        self.sizes.target.bits.fill_(-1)

    def masses(self, *shape: int, sharpness: float = 3.0) -> torch.Tensor:
        logits = sharpness * torch.randn(*shape, WIDTH, generator=self.generator)
        return logits.softmax(-1)

    def verify(self, lens: list[int]) -> torch.Tensor:
        """A step of the target whose row r left mass on lens[r] tokens; 0: it read a selection."""
        target = self.sizes.target
        mass = self.masses(len(lens), TABLES, HEADS)
        for r, n in enumerate(lens):
            mass[r, ..., n:] = torch.nan  # left by another step
        target.mass[: len(lens)] = mass
        target.lens.zero_()
        target.lens[: len(lens)] = torch.tensor(lens)
        return mass


def in_order(mass: list[float], options: SpecAttnOptions) -> tuple[list[int], int]:
    """Positions in the order in which they are taken, and how many of them are taken whatever they hold."""
    n = len(mass)
    forced = [p for p in range(n) if p < options.sink_tokens or p >= n - options.recent_tokens]
    quanta = [int(m * 2**30) for m in mass]
    rest = sorted(set(range(n)) - set(forced), key=lambda p: (quanta[p], p), reverse=True)
    return forced + rest, len(forced)


def size_of(mass: list[float], options: SpecAttnOptions) -> int:
    order, count = in_order(mass, options)
    quanta = [int(m * 2**30) for m in mass]
    while sum(quanta[p] for p in order[:count]) * 65536 < sum(quanta) * round(options.size_top_p * 65536):
        count += 1
    return count


def chosen(mass: list[float], size: int, options: SpecAttnOptions) -> set[int]:
    order, forced = in_order(mass, options)
    cap = math.ceil(len(mass) * round(options.max_fraction * 65536) / 65536)
    cap = min(max(cap, options.min_tokens), len(mass) if options.max_tokens is None else options.max_tokens)
    count = max(min(math.ceil(size * options.size_factor), cap), min(options.min_tokens, cap), forced)
    return set(order[:count])


def ints(values: list[int], dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def slots(*values: int) -> torch.Tensor:
    return ints([*values], torch.int64)


def test_sizes_are_those_of_plain_python_and_go_to_the_rows_slots():
    setup = Setup()
    sizes = setup.sizes
    sizes.sizes.fill_(7)
    mass = setup.verify([90, 0, 33])
    sizes.learn(slots(2, 0, 1))
    for r, slot in ((0, 2), (2, 1)):
        n = (90, 0, 33)[r]
        wanted = [[size_of(mass[r, t, h, :n].tolist(), setup.options) for h in range(HEADS)] for t in range(TABLES)]
        assert sizes.sizes[slot].tolist() == wanted
    assert len(set(sizes.sizes[:3].flatten().tolist())) > 4, "layers and heads differ"
    # A row that read a selection keeps what it had, and nobody else's slot is touched.
    assert (sizes.sizes[0] == 7).all() and (sizes.sizes[3] == 7).all()


def test_rows_that_only_fill_a_batch_are_nobody():
    setup = Setup()
    setup.verify([50, 0, 0])
    setup.sizes.learn(slots(3, -1, -1))
    assert (setup.sizes.sizes[3] > 0).all()
    assert not setup.sizes.sizes[:3].any()


def test_a_size_that_is_known_is_never_zero():
    """Where the first tokens and the last are not kept, and the newest hold all of the mass."""
    setup = Setup(sink_tokens=0, recent_tokens=0)
    setup.verify([40])
    setup.sizes.target.mass[0, 1, 0, :40] = 0.0
    setup.sizes.learn(slots(0))
    assert setup.sizes.sizes[0, 1, 0] == 1


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
    setup.sizes.sizes.fill_(5)
    begin(setup, rows=4)
    assert [int(known.sum()) for known in setup.sizes.sizes[:4] > 0] == [TABLES * HEADS, 0, TABLES * HEADS, 0]


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
        {"rule": "top_k", "ratio": 0.01},
    ],
    ids=str,
)


@CHANGES
@pytest.mark.parametrize("executor", ["torch", "triton"])
def test_each_head_reads_as_much_as_its_size_of_what_its_draft_head_attended_to(executor, changes):
    """The rule and its ratio are the draft's own, and say nothing here."""
    if executor == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1, set from the start")
    setup = Setup(executor, **changes)
    sizes, lens, of = setup.sizes, [80, 61, 0, 33], (1, 3, 0, 2)
    sizes.sizes.copy_(torch.randint(1, 30, sizes.sizes.shape, generator=setup.generator))
    sizes.sizes[2] = 0  # of row 3: has not yet read everything
    mass = setup.masses(SOURCES, 4, DRAFT_HEADS)
    for r, n in enumerate(lens):
        mass[:, r, :, n:] = torch.nan
    bits, ranked = sizes.select(mass, slots(*of), ints(lens))
    assert bits.shape == (TABLES, 4, HEADS, WIDTH // 32)
    assert ranked.tolist() == [80, 61, 0, 0]
    for t, (source, groups) in enumerate(MADE_FROM):
        for h, group in enumerate(groups):
            for r, n in enumerate(ranked.tolist()):
                row = mass[source, r, group, :n].tolist()
                wanted = chosen(row, int(sizes.sizes[of[r], t, h]), setup.options) if n else set()
                assert set(unpack_bits(bits[t, r, h], WIDTH).nonzero().flatten().tolist()) == wanted


def test_what_is_kept_is_kept_for_as_long_as_nothing_new_is_known():
    """Rounds that read selections leave the sizes alone."""
    setup = Setup()
    setup.verify([70])
    setup.sizes.learn(slots(1))
    learned = setup.sizes.sizes.clone()
    for _ in range(3):
        setup.verify([0])
        setup.sizes.learn(slots(1))
    assert setup.sizes.sizes.equal(learned)


def test_its_size_is_that_of_its_buffers():
    sizes = Setup().sizes
    masses, heads = REQUESTS * TABLES * HEADS, TABLES * HEADS
    scored = REQUESTS * 2 * 4
    assert sizes.nbytes["scores"] == 4 * scored * WIDTH
    assert sizes.nbytes["mass"] == 4 * (masses * WIDTH + scored + REQUESTS + REQUESTS + 1) + 8 * 2 * REQUESTS
    assert sizes.nbytes["bitmasks"] == 4 * (masses * (WIDTH // 32 + 1) + (REQUESTS + 1) * heads) + 8 * REQUESTS

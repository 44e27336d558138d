"""Token ids by slot, and what they change of a choice in layers that copy."""

from __future__ import annotations

import math
import os

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.selection.induction import Induction
from specattn_vllm.selection.shares import Choice

CPU = torch.device("cpu")
STEPS, MAX_LEN, SLOTS = 3, 70, 5  # as in conftest.py


def ids_only() -> Induction:
    made = Induction(
        executors.resolve("torch", CPU), [0], num_steps=STEPS, max_num_reqs=SLOTS, max_model_len=MAX_LEN, device=CPU
    )
    made.ids.fill_(-7)
    return made


def known(made: Induction, slot: int) -> list[int]:
    """The ids of a slot up to the first that was never written."""
    row = made.ids[slot].tolist()
    return row[: row.index(-7)]


def test_a_request_enters_with_all_of_its_tokens():
    made = ids_only()
    made.enter(3, [5, 6, 7])
    made.enter(1, [])
    assert known(made, 3) == [5, 6, 7]
    made.enter(3, [8, 9])  # somebody else; what is behind is written before it is read
    assert made.ids[3, :3].tolist() == [8, 9, 7]
    assert all(known(made, slot) == [] for slot in (0, 1, 2, 4))


def test_rounds_of_too_many_drafts_are_refused_with_the_remedy():
    shape = {"max_num_reqs": 1, "max_model_len": 8, "device": CPU}
    Induction(executors.resolve("torch", CPU), [0], num_steps=63, **shape)
    with pytest.raises(ValueError, match=r"at most 63 draft tokens a round, not 64: .* or set induction=false"):
        Induction(executors.resolve("torch", CPU), [0], num_steps=64, **shape)


def test_a_round_brings_the_accepted_drafts_and_the_token_after_them():
    """Stretches of the draft's first step: the token sampled before, drafts, the sampled one, and rejected slots."""
    made, context = ids_only(), 20
    stretches = [
        # slot, tokens up to the sampled one, tokens behind it, whether it sampled
        (2, [10, 11, 12, 13, 14], 0, True),  # all drafts accepted
        (0, [20, 21], 3, True),  # none
        (4, [30, 31, 32], 2, False),  # inside its prompt
        (-1, [40, 41], 1, False),  # fills a graph's batch
        (1, [*range(50, 60)], 0, True),  # the end of a prompt, longer than a round: its ids are there already
    ]
    starts, rows, ids, positions = [], [], [], []
    for _, tokens, behind, _ in stretches:
        starts.append(len(ids))
        rows.append(len(ids) + len(tokens) - 1)
        ids += tokens + [99] * behind
        positions += range(context, context + len(tokens) + behind)
    made.extend(
        torch.tensor([stretch[0] for stretch in stretches]),
        torch.tensor([stretch[3] for stretch in stretches]),
        torch.tensor(rows),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(positions),
    )
    written = {slot: (made.ids[slot] != -7).nonzero().flatten().tolist() for slot in range(SLOTS)}
    assert written == {0: [20, 21], 1: [26, 27, 28, 29], 2: [21, 22, 23, 24], 3: [], 4: []}
    assert made.ids[2, 21:25].tolist() == [11, 12, 13, 14]
    assert made.ids[0, 20:22].tolist() == [20, 21]
    assert made.ids[1, 26:30].tolist() == [56, 57, 58, 59]


EXECUTORS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs it")),
]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("changes", [{}, {"sparse_draft": True}, {"method": "sts"}], ids=str)
def test_what_follows_comes_before_what_weighs_less_than_the_mean(
    changes, executor, new_draft, options, make, sources, tokens
):
    """Three selections: of each source as it is, and of the second with what follows the round's tokens."""
    opts = options(rule="top_k", ratio=0.3, **changes)
    choices = (Choice(0, 0.3), Choice(1, 0.2), Choice(1, 0.4, induction=True))
    draft, slots = new_draft([60, 33, 12]), [3, 0, 2]
    capture = make(opts, executor=executor, choices=choices)
    gen = torch.Generator().manual_seed(1)
    context = torch.randint(0, 12, (3, MAX_LEN), generator=gen).tolist()
    for row, slot in enumerate(slots):
        capture.induction.enter(slot, context[row][: draft.lens[row]])
    drafts = torch.randint(0, 12, (3, STEPS), generator=gen)
    draft.run(capture, [True, True, False], slots=slots)
    bits, prefix_lens = capture.select(drafts)
    assert prefix_lens.tolist() == [59, 32, 0]
    changed = 0
    for t, (source, fraction, copies) in enumerate(choices):
        for row, length in enumerate((59, 32)):
            coming = {context[row][length], *drafts[row].tolist()}
            follows = {p for p in range(1, length) if context[row][p - 1] in coming}
            assert 0 < len(follows) < length - 3
            for group in range(bits.shape[2]):
                mass = draft.combined(sources[source], row, opts, group if bits.shape[2] > 1 else None)
                plain = heaviest(mass, length, fraction)
                if copies:
                    mass = [m + 0.5 / length * (p in follows) for p, m in enumerate(mass)]
                wanted = heaviest(mass, length, fraction)
                assert tokens(bits[t, row, group]) == wanted, (t, row, group)
                changed += wanted != plain
    assert changed


def heaviest(mass: list[float], length: int, fraction: float) -> set[int]:
    """With the first token and the last two, which are always kept."""
    always = {0, length - 2, length - 1}
    others = sorted(set(range(length)) - always, key=lambda p: (-mass[p], -p))
    return always | set(others[: math.ceil(round(fraction * 65536) * length / 65536) - len(always)])

"""Rounds that recall: step 0 reads what an earlier round's step 0 kept and everything since, in several query rows."""

from __future__ import annotations

import itertools

import pytest
import torch

METHOD = pytest.mark.parametrize("changes", [{}, {"method": "sts", "ratio": 0.25}], ids=["specattn", "sts"])
STEPS = 3  # as in conftest.py
FIRST = [52, 30, 17, 9]
# Rows 0 and 1 have changed places. All are 3 to 8 tokens longer, and their query tokens newer than what was there then.
LATER, BEFORE = [33, 60, 20, 15], [2, 4, 0, 5]
SLOTS = [3, 0, 4, 1]


@pytest.fixture
def two_rounds(new_draft, options, make):
    """two_rounds(executor, ...): the options, a capture after both rounds, both drafts, and the outputs of the
    second. The third row had no choice in the first round."""

    def run(executor="torch", wanted=(True, True, True, True), **changes):
        opts = options(sparse_draft=True, refresh_draft_every=4, **changes)
        capture = make(opts, executor=executor)
        first, later = new_draft(FIRST), new_draft(LATER, seed=1, before=BEFORE)
        first.run(capture, [True, True, False, True], slots=[SLOTS[1], SLOTS[0], SLOTS[2], SLOTS[3]])
        steps = later.run(capture, [*wanted], slots=SLOTS, recall=True)
        return opts, capture, first, later, steps

    return run


# Row of the second round -> row of the first in the same slot, where there was a choice.
SAME = {0: 1, 1: 0, 3: 3}


def recalled(first, later, name, r, opts) -> list[int] | None:
    """Positions below the sampled token that row r lists."""
    if r not in SAME:
        return None
    then = first.lens[SAME[r]] - 1
    context = later.lens[r] - 1
    return sorted(first.first_choice(name, SAME[r], opts) & set(range(context)) | set(range(then, context)))


@METHOD
def test_the_first_step_reads_the_recalled_list(two_rounds, sources, extra, changes):
    opts, _, first, later, steps = two_rounds(**changes)
    shorter = 0
    for name, r in itertools.product((*sources, extra), range(4)):
        done, out = steps[0][name]
        assert done
        listed = recalled(first, later, name, r, opts)
        for i, t in enumerate(range(later.starts[r], later.starts[r + 1])):
            seen = later.lens[r] - later.before[r] + i
            read = (
                [*range(seen)]
                if listed is None
                else [p for p in (*listed, *range(later.lens[r] - 1, seen)) if p < seen]
            )
            shorter += len(read) < seen
            wanted = later.attention(name, later.queries[name, 0][t], r, read)[1].float()
            torch.testing.assert_close(out[t], wanted, rtol=1e-4, atol=1e-5)
    assert shorter > 20


@METHOD
def test_later_steps_read_the_same_list_and_what_is_newer(two_rounds, sources, extra, changes):
    opts, _, first, later, steps = two_rounds(**changes)
    for k, name, r in itertools.product((1, 2), (*sources, extra), range(4)):
        listed = recalled(first, later, name, r, opts)
        if listed is None:
            listed = sorted(later.first_choice(name, r, opts))
        read = [*listed, *range(later.lens[r] - 1, later.lens[r] + k)]
        wanted = later.attention(name, later.queries[name, k][r], r, read)[1].float()
        torch.testing.assert_close(steps[k][name][1][r], wanted, rtol=1e-4, atol=1e-5)


def test_the_target_s_selection_has_mass_where_the_draft_read(two_rounds, sources):
    opts, capture, first, later, _ = two_rounds()
    prefix_lens = capture.select()[1]
    assert prefix_lens.tolist() == [n - 1 for n in later.lens]
    for (s, name), r in itertools.product(enumerate(sources), SAME):
        context = later.lens[r] - 1
        listed = recalled(first, later, name, r, opts)
        masses = []
        for k in range(STEPS):
            row = int(later.query_rows[r]) if k == 0 else r
            read = [*listed, *range(context, later.lens[r] + k)]
            weights = later.attention(name, later.queries[name, k][row], r, read)[0].mean(0)
            mass = torch.zeros(context, dtype=torch.float64)
            mass[listed] = weights[: len(listed)]
            masses.append(mass)
        stacked = torch.stack([*masses, torch.nn.functional.pad(masses[-1][:-1], (1, 0))])  # with the bonus row
        wanted = stacked.mean(0).float()
        torch.testing.assert_close(capture.ranking.mass[s, r, 0, :context], wanted, rtol=1e-4, atol=1e-6)


def test_triton_and_torch_recall_alike(two_rounds, sources):
    (_, one, _, _, a), (_, other, _, _, b) = (two_rounds(executor=executor) for executor in ("torch", "triton"))
    for k, name in itertools.product(range(STEPS), sources):
        used = a[k][name][1].isfinite()
        assert used.any()
        torch.testing.assert_close(a[k][name][1], b[k][name][1], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(one.select()[0], other.select()[0])


def test_rows_that_are_not_wanted_read_everything(two_rounds, sources, extra):
    _, capture, _, later, steps = two_rounds(wanted=(False, True, True, True))
    for name in (*sources, extra):
        seen = range(later.lens[0] - later.before[0], later.lens[0] + later.after[0] + 1)
        for t, n in zip(range(later.starts[0], later.starts[1]), seen, strict=True):
            wanted = later.attention(name, later.queries[name, 0][t], 0, range(n))[1].float()
            torch.testing.assert_close(steps[0][name][1][t], wanted, rtol=1e-4, atol=1e-5)
    assert capture.select()[1].tolist()[0] == 0

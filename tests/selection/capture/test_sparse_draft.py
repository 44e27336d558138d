"""`sparse_draft`: draft steps after the first read what the first one's top-p kept, and everything newer."""

from __future__ import annotations

import itertools

import pytest
import torch

from specattn_vllm.selection.shares import Choice

COMBINE = pytest.mark.parametrize("combine", ["sum", "union"])
LENS = (60, 33, 20, 17)
BLOCK, STEPS = 16, 3  # as in conftest.py


@pytest.fixture
def sparse(options):
    """sparse(combine, **changes): options with `sparse_draft`."""
    return lambda combine="sum", **changes: options(combine, sparse_draft=True, **changes)


@COMBINE
@pytest.mark.parametrize("changes", [{}, {"draft_ratio": 0.5}, {"ratio": 0.2, "draft_ratio": 0.6}], ids=str)
def test_later_steps_read_what_the_first_kept_and_what_is_newer(
    draft_of, sparse, make, sources, extra, combine, changes
):
    draft, opts = draft_of(*LENS), sparse(combine, **changes)
    steps = draft.run(make(opts), [True] * 4)
    for k, name in itertools.product((1, 2), (*sources, extra)):
        done, out = steps[k][name]
        assert done
        for r in range(4):
            assert len(draft.read(name, k, r, opts)) < LENS[r] + k  # or nothing would be shown
            wanted = draft.step_output(name, k, r, opts)[0].float()
            torch.testing.assert_close(out[r], wanted, rtol=1e-4, atol=1e-5)


def test_nothing_else_is_read(new_draft, sparse, make, sources, extra):
    draft, opts = new_draft([*LENS]), sparse()
    chosen = {(name, r): draft.read(name, 2, r, opts) for name in (*sources, extra) for r in range(4)}

    def poison(k):
        for (name, r), read in chosen.items() if k == 0 else ():
            for p in set(range(LENS[r] - 1)) - {*read}:
                draft.caches[name][draft.block_table[r, p // BLOCK], :, p % BLOCK] = torch.nan

    steps = draft.run(make(opts), [True] * 4, after_step=poison)
    for k, name in itertools.product((1, 2), (*sources, extra)):
        assert steps[k][name][1].isfinite().all()
    assert any(cache.isnan().sum() > draft.caches["other"].isnan().sum() for cache in draft.caches.values())


@COMBINE
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_tokens": 9}, {"min_tokens": 25}, {"max_fraction": 0.25}, {"draft_ratio": 0.5},
     {"ratio": 0.2, "draft_ratio": 0.6}],
    ids=str,
)  # fmt: skip
def test_the_target_s_selection_sees_later_mass_only_on_what_was_read(
    draft_of, sparse, make, sources, tokens, combine, changes
):
    draft, opts = draft_of(*LENS), sparse(combine, **changes)
    capture = make(opts)
    draft.run(capture, [True] * 4)
    bits, prefix_lens = capture.select()
    # The third layer is captured for the draft alone.
    assert bits.shape == (2, 4, 1, 3)
    assert prefix_lens.tolist() == [n - 1 for n in LENS]
    for (s, name), r in itertools.product(enumerate(sources), range(4)):
        assert tokens(bits[s, r, 0]) == draft.selection(opts, name, r), (name, r)


def test_a_union_of_layers_with_shares_holds_nothing_of_the_round_before(draft_of, sparse, make, sources, tokens):
    """Each has a selection of its own, which is no part of what the draft chose for itself in the first step."""
    draft, opts = draft_of(*LENS), sparse("union", ratio=0.3)
    capture = make(opts, choices=(Choice(0, 0.3), Choice(1, 0.3)))
    for _ in range(2):
        capture.shared_out._bits.fill_(-1)
        draft.run(capture, [True] * 4)
        bits, _ = capture.select()
        for (s, name), r in itertools.product(enumerate(sources), range(4)):
            assert tokens(bits[s, r, 0]) == draft.selection(opts, name, r), (name, r)


def test_the_mass_of_a_step_is_that_of_its_own_softmax(draft_of, sparse, make, sources):
    """What a pruned step reads shares a mass of 1 among less."""
    draft, opts = draft_of(*LENS), sparse()
    capture = make(opts)
    draft.run(capture, [True] * 4)
    for (s, name), r in itertools.product(enumerate(sources), range(4)):
        wanted = torch.tensor(draft.combined(name, r, opts))
        torch.testing.assert_close(capture.ranking.mass[s, r, 0, : LENS[r] - 1], wanted, rtol=1e-4, atol=1e-7)


def test_the_union_s_mass_is_that_of_the_last_step_alone(draft_of, sparse, make, sources):
    """Each step of the union rule is chosen from by itself: nothing of the step before may be left in it."""
    draft, opts = draft_of(*LENS), sparse("union")
    capture = make(opts)
    draft.run(capture, [True] * 4)
    for (s, name), r in itertools.product(enumerate(sources), range(4)):
        wanted = torch.tensor(draft.step_mass(name, r, opts)[-1])
        torch.testing.assert_close(capture.ranking.mass[s, r, 0, : LENS[r] - 1], wanted, rtol=1e-4, atol=1e-7)


def test_it_makes_a_difference_to_later_steps_alone(draft_of, sparse, options, sources):
    # Otherwise the tests above would pass with the attention of `sparse_draft: false`.
    draft = draft_of(*LENS)
    with_it, without = (
        [draft.step_mass(name, r, opts) for name in sources for r in range(4)] for opts in (sparse(), options())
    )
    assert [m[0] for m in with_it] == [m[0] for m in without]
    assert all(a[1:] != b[1:] for a, b in zip(with_it, without, strict=True))


@COMBINE
def test_rows_that_are_not_wanted_read_everything(draft_of, sparse, options, make, sources, extra, combine):
    draft, opts = draft_of(*LENS), sparse(combine)
    capture = make(opts)
    capture.scores.fill_(torch.nan)
    steps = draft.run(capture, [False, True, False, True])
    for k, name in itertools.product((1, 2), (*sources, extra)):
        for r in range(4):
            wanted = draft.step_output(name, k, r, opts if r in (1, 3) else options(combine))[0].float()
            torch.testing.assert_close(steps[k][name][1][r], wanted, rtol=1e-4, atol=1e-5)
    assert capture.scores[[0, 2]].isnan().all()
    assert capture.select()[1].tolist() == [0, 32, 0, 16]


@COMBINE
def test_a_row_without_context_reads_everything(draft_of, sparse, make, sources, extra, combine):
    draft, opts = draft_of(1, 2, 33), sparse(combine)
    steps = draft.run(make(opts), [True] * 3)
    for k, name, r in itertools.product((1, 2), (*sources, extra), range(3)):
        wanted = draft.step_output(name, k, r, opts)[0].float()
        torch.testing.assert_close(steps[k][name][1][r], wanted, rtol=1e-4, atol=1e-5)


def test_layers_that_choose_for_nobody_are_scored_in_the_first_step_only(draft_of, sparse, make, extra):
    draft, capture = draft_of(*LENS), make(sparse())
    scored = []

    def watch(k, layer):
        scored.append((k, layer, not capture.scores[0, :, :5].isnan().any().item()))
        capture.scores.fill_(torch.nan)

    capture.scores.fill_(torch.nan)
    draft.run(capture, [True] * 4, after_layer=watch)
    last = capture.layer_sources[extra]
    assert len(scored) == STEPS * 3
    assert all(was == (k == 0 or layer != last) for k, layer, was in scored)


@COMBINE
def test_under_a_target_that_reads_everything(draft_of, sparse, make, sources, extra, combine):
    """Method 'dense': no layer chooses for the target, and all of them for the draft."""
    draft, opts = draft_of(*LENS), sparse(combine)
    capture = make(opts, num_sources=0)
    steps = draft.run(capture, [True] * 4)
    for k, name, r in itertools.product((1, 2), (*sources, extra), range(4)):
        wanted = draft.step_output(name, k, r, opts)[0].float()
        torch.testing.assert_close(steps[k][name][1][r], wanted, rtol=1e-4, atol=1e-5)
    bits, _ = capture.select()
    assert bits.shape[0] == 0


def test_long_prompts_in_the_first_step(new_draft, sparse, make, sources, extra, tokens):
    """Their attention is the backend's, but what later steps read is chosen all the same."""
    draft, opts = new_draft([60, 33], before=[20, 3]), sparse()
    capture = make(opts)
    steps = draft.run(capture, [True, True])
    for name in (*sources, extra):
        assert [steps[k][name][0] for k in range(STEPS)] == [False, True, True]
    for k, name, r in itertools.product((1, 2), (*sources, extra), range(2)):
        wanted = draft.step_output(name, k, r, opts)[0].float()
        torch.testing.assert_close(steps[k][name][1][r], wanted, rtol=1e-4, atol=1e-5)
    bits, _ = capture.select()
    for (s, name), r in itertools.product(enumerate(sources), range(2)):
        assert tokens(bits[s, r, 0]) == draft.selection(opts, name, r)


def test_layers_that_are_not_captured_are_left_alone(draft_of, sparse, make):
    for results in draft_of(*LENS).run(make(sparse()), [True] * 4):
        done, out = results["other"]
        assert not done
        assert out.isnan().all()


@COMBINE
@pytest.mark.parametrize("changes", [{}, {"method": "sts", "ratio": 0.25}], ids=["specattn", "sts"])
def test_a_round_for_the_draft_alone_reads_the_same_and_scores_its_first_step_only(
    draft_of, sparse, make, sources, extra, combine, changes
):
    if combine == "union" and changes:
        pytest.skip("the union is of shares of mass")
    draft, opts = draft_of(*LENS), sparse(combine, **changes)
    whole, light = make(opts), make(opts)
    scored = []

    def note(k, layer):
        scored.append((k, light.scores.isnan().all().item()))
        light.scores.fill_(torch.nan)

    light.scores.fill_(torch.nan)
    for_target = light.ranking._mass.fill_(torch.nan) if light.own_ranking is not light.ranking else None
    steps = draft.run(whole, [True] * 4)
    same = draft.run(light, [True] * 4, after_layer=note, for_target=False)
    for k, name in itertools.product(range(STEPS), (*sources, extra)):
        assert same[k][name][0] == steps[k][name][0]
        torch.testing.assert_close(same[k][name][1], steps[k][name][1], rtol=0, atol=0, equal_nan=True)
    assert {(k, not none) for k, none in scored} == {(0, True), (1, False), (2, False)}
    assert for_target is None or for_target.isnan().all(), "mass that nobody chooses from"
    assert torch.equal(light.lists.positions, whole.lists.positions) and torch.equal(light.lists.kept, whole.lists.kept)

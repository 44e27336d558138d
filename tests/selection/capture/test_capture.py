"""The capture: the draft's attention, averaged over heads and combined over steps, becomes the selection."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.capture import MAX_FUSED_QUERY

COMBINE = pytest.mark.parametrize("combine", ["sum", "union"])
STEPS, MAX_LEN, HEADS = 3, 70, 4  # as in conftest.py


@COMBINE
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_tokens": 9}, {"min_tokens": 40}, {"max_fraction": 0.25}, {"top_p": 1.0}, {"sink_tokens": 80}],
    ids=str,
)
def test_the_selection_is_that_of_the_draft_s_attention(draft_of, options, make, sources, tokens, combine, changes):
    draft, opts = draft_of(60, 33, MAX_LEN - STEPS, 17), options(combine, **changes)
    capture = make(opts)
    draft.run(capture, [True] * 4)
    bits, prefix_lens = capture.select()
    assert bits.shape == (2, 4, 1, 3)
    # The sampled token is the first that verification recomputes; the context is what comes before.
    assert prefix_lens.tolist() == [length - 1 for length in draft.lens]
    assert prefix_lens.dtype == torch.int32
    for (s, name), r in itertools.product(enumerate(sources), range(4)):
        assert tokens(bits[s, r, 0]) == draft.selection(opts, name, r), (name, r)


def test_the_rules_differ_on_this_data(draft_of, options, sources):
    # Otherwise the test above could not tell them apart.
    draft = draft_of(60, 33, MAX_LEN - STEPS, 17)
    chosen = [
        tuple(frozenset(draft.selection(options(combine), name, r)) for name in sources for r in range(4))
        for combine in ("sum", "union")
    ]
    assert len(set(chosen)) == 2
    assert all(0 < len(each) < draft.lens[i % 4] - 1 for rule in chosen for i, each in enumerate(rule))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set from the start")
@COMBINE
def test_the_kernels_select_the_same(new_draft, options, make, sources, tokens, combine):
    draft, opts = new_draft([20, 33]), options(combine)
    capture = make(opts, executor="triton")
    draft.run(capture, [True, True])
    bits, prefix_lens = capture.select()
    assert prefix_lens.tolist() == [19, 32]
    for (s, name), r in itertools.product(enumerate(sources), range(2)):
        assert tokens(bits[s, r, 0]) == draft.selection(opts, name, r), (name, r)


def test_the_mass_is_the_mean_over_heads_and_steps(draft_of, options, make, sources):
    draft, opts = draft_of(60, 33), options()
    capture = make(opts)
    draft.run(capture, [True, True])
    for (s, name), r in itertools.product(enumerate(sources), range(2)):
        wanted = torch.tensor(draft.combined(name, r))
        torch.testing.assert_close(capture.ranking.mass[s, r, 0, : draft.lens[r] - 1], wanted, rtol=1e-4, atol=1e-7)


@COMBINE
def test_mass_never_sums_to_more_than_one(draft_of, options, make, combine):
    """The selection computes in fixed point, which overflows at 2; a step's mass is 1 at most, and so is a round's."""
    draft, capture = draft_of(60, 33, 2), make(options(combine))
    sums = []

    def watch(k, source):
        sums.extend(capture.ranking.mass[source, r, 0, : n - 1].sum().item() for r, n in enumerate(draft.lens))

    draft.run(capture, [True] * 3, after_layer=watch)
    assert len(sums) == STEPS * len(capture.layer_sources) * 3
    assert max(sums) <= 1 + 1e-5
    assert max(sums) > 0.2


@COMBINE
def test_rows_that_are_not_wanted_get_nothing_and_change_nothing(draft_of, options, make, sources, tokens, combine):
    draft, opts = draft_of(60, 33, 20, 17), options(combine)
    capture = make(opts)
    capture.scores.fill_(torch.nan)
    capture.lse.fill_(torch.nan)
    draft.run(capture, [True, False, True, False])
    bits, prefix_lens = capture.select()
    assert prefix_lens.tolist() == [59, 0, 19, 0]
    for (s, name), r in itertools.product(enumerate(sources), range(4)):
        wanted = draft.selection(opts, name, r) if r in (0, 2) else set()
        assert tokens(bits[s, r, 0]) == wanted
    # Nothing was scored for the others, in any step.
    assert capture.scores[[1, 3]].isnan().all()
    assert capture.lse[[1, 3]].isnan().all()
    assert not capture.lse[[0, 2]].isnan().any()


@COMBINE
def test_a_round_without_wanted_rows_selects_nothing(draft_of, options, make, combine):
    draft, capture = draft_of(60, 33), make(options(combine))
    capture.ranking._bits.fill_(-1)
    draft.run(capture, [False, False])
    bits, prefix_lens = capture.select()
    assert prefix_lens.tolist() == [0, 0]
    assert not bits.any()


@COMBINE
def test_a_first_token_has_no_context_to_select_from(draft_of, options, make, tokens, combine):
    draft, capture = draft_of(1, 2), make(options(combine))
    draft.run(capture, [True, True])
    bits, prefix_lens = capture.select()
    assert prefix_lens.tolist() == [0, 1]
    assert [tokens(bits[0, r, 0]) for r in range(2)] == [set(), {0}]


@COMBINE
def test_rounds_of_different_sizes_do_not_see_each_other(draft_of, options, make, sources, tokens, combine):
    opts = options(combine)
    capture = make(opts)
    for seed, lens in enumerate(([60, 33, 20, 17, 50], [9], [66, 40], [5, 6, 7, 8, 9])):
        # Bits nobody set, masses above everything: what an earlier round left must not matter.
        capture.ranking._bits.fill_(-1)
        capture.ranking._mass.fill_(1e9)
        capture.scores.fill_(1e9)
        draft = draft_of(*lens, seed=seed)
        draft.run(capture, [True] * len(lens))
        bits, prefix_lens = capture.select()
        assert prefix_lens.tolist() == [length - 1 for length in lens]
        for (s, name), r in itertools.product(enumerate(sources), range(len(lens))):
            assert tokens(bits[s, r, 0]) == draft.selection(opts, name, r)


# Step 0


def test_the_first_step_does_the_attention_of_every_token_of_short_rows(draft_of, options, make, sources):
    """Those before the sampled one, the rejected ones behind it, and those of rows that are not wanted."""
    draft, opts = draft_of(60, 33, 20), options()
    assert draft.before == [0, 1, 2] and draft.after == [1, 2, 0]
    steps = draft.run(make(opts), [True, False, True])
    for name in sources:
        done, out = steps[0][name]
        assert done
        wanted = torch.cat([draft.step_output(name, 0, r) for r in range(3)]).float()
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


@COMBINE
def test_long_rows_are_scored_and_left_to_the_backend(new_draft, options, make, sources, tokens, combine):
    draft, opts = new_draft([60, 33, 40, 20], before=[17, 2, 0, 19]), options(combine)
    capture = make(opts)
    capture.scores.fill_(torch.nan)
    steps = draft.run(capture, [True, True, False, True])
    for name in sources:
        done, out = steps[0][name]
        assert not done
        assert out.isnan().all()
    bits, prefix_lens = capture.select()
    assert prefix_lens.tolist() == [59, 32, 0, 19]
    for (s, name), r in itertools.product(enumerate(sources), (0, 1, 3)):
        assert tokens(bits[s, r, 0]) == draft.selection(opts, name, r), (name, r)
    assert capture.scores[2].isnan().all()


@pytest.mark.parametrize(("tokens_of_a_row", "fused"), [(MAX_FUSED_QUERY, True), (MAX_FUSED_QUERY + 1, False)])
def test_where_short_ends(new_draft, options, make, sources, tokens_of_a_row, fused):
    draft = new_draft([40], before=[tokens_of_a_row - 2])  # and one rejected
    assert draft.batch(0).max_query_len == tokens_of_a_row
    steps = draft.run(make(options()), [True])
    assert [steps[0][name][0] for name in sources] == [fused] * 2


@pytest.mark.parametrize("before", [None, [17, 1, 2]], ids=["short", "long"])
def test_at_step_0_the_sampled_rows_are_picked_out_of_the_batch(new_draft, options, make, before):
    draft, opts = new_draft([60, 33, 20], before=before), options()
    picked, first_rows = make(opts), make(opts)
    draft.run(picked, [True] * 3)
    draft.query_rows = torch.tensor(draft.starts[:-1])
    draft.run(first_rows, [True] * 3)
    assert not torch.equal(picked.select()[0], first_rows.select()[0])


# Later steps


def test_later_steps_do_the_attention_of_every_row(draft_of, options, make, sources):
    """Of rows that are not wanted too: inside a prompt, nobody uses the result, but nothing else would compute it."""
    draft, opts = draft_of(60, 33, 20), options()
    steps = draft.run(make(opts), [True, False, True])
    for k, name in itertools.product((1, 2), sources):
        done, out = steps[k][name]
        assert done
        wanted = torch.cat([draft.step_output(name, k, r) for r in range(3)]).float()
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_other_layers_are_left_alone(draft_of, options, make):
    for results in draft_of(60).run(make(options()), [True]):
        done, out = results["other"]
        assert not done
        assert out.isnan().all()


# Batches of a CUDA graph


@COMBINE
def test_rows_that_fill_a_graph_s_batch_change_nothing(new_draft, options, make, sources, tokens, combine):
    """They have as many tokens as a verification, a context of one, and blocks of nobody."""
    opts = options(combine)
    draft = new_draft([20, 33, 1, 1], before=[2, 1, 3, 3])
    draft.after = [1, 2, 0, 0]
    draft.starts = [0, 4, 8, 12, 16]
    draft.query_rows = torch.tensor([2, 5, 11, 15])
    draft.queries = {(name, k): draft.randn(16 if k == 0 else 4, HEADS, 64) for name, k in draft.queries}
    draft.block_table[2:] = 0
    capture = make(opts)
    capture.scores.fill_(torch.nan)
    steps = draft.run(capture, [True, True, False, False])
    bits, prefix_lens = capture.select()
    assert prefix_lens.tolist() == [19, 32, 0, 0]
    for (s, name), r in itertools.product(enumerate(sources), range(2)):
        assert tokens(bits[s, r, 0]) == draft.selection(opts, name, r), (name, r)
        wanted = draft.step_output(name, 0, r).float()
        torch.testing.assert_close(steps[0][name][1][4 * r : 4 * r + 4], wanted, rtol=1e-4, atol=1e-5)
    assert not bits[:, 2:].any()
    assert capture.scores[2:].isnan().all()


def test_a_round_of_the_same_size_lies_at_the_same_addresses(draft_of, options, make):
    """A graph that was captured in one round is replayed in others, and `put` reads what it wrote."""
    capture = make(options("sum"))
    places = []
    for lens in ((60, 33), (9,), (66, 40)):
        draft_of(*lens).run(capture, [True] * len(lens))
        bits, _ = capture.select()
        held = (capture.ranking.mass, bits, capture.ranking.counts, capture.scores, capture.lse)
        places.append([t.data_ptr() for t in held])
    assert places[0] == places[2]


# Sizes


def test_its_size_is_that_of_its_buffers(options, make):
    requests, layers = 5, 2
    scores = requests * HEADS * (MAX_LEN + 1)  # with their logsumexp
    selections = layers * requests * (MAX_LEN + 3 + 1)  # mass, bits, and their count
    assert make(options()).nbytes == 4 * (scores + selections) + 8 * requests + 4 * (requests + 1)


@COMBINE
def test_a_round_without_a_draft_step_selects_nothing(make, combine):
    """Also after a round that did, of another size: nothing of it may be stored again."""
    capture = make(SpecAttnOptions.parse({"method": "specattn", "combine": combine}))
    for rows in (3, 1, 2):
        capture.begin_round(torch.ones(rows, dtype=torch.bool))
        capture.ranking._bits.fill_(-1)
        bits, prefix_lens = capture.select()
        assert bits.shape[1] == rows
        assert not bits.any()
        assert prefix_lens.tolist() == [0] * rows

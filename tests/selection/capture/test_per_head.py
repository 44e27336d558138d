"""Method 'sts': each KV head of a draft layer chooses by its own query heads."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

COMBINE = pytest.mark.parametrize("combine", ["sum", "union"])
LENS = (60, 33, 17)
HEADS, KV_HEADS, MAX_LEN, STEPS = 4, 2, 70, 3  # as in conftest.py


@pytest.fixture
def per_head(options):
    """per_head(combine, **changes): options of method 'sts'; by default a quarter of the context."""
    return lambda combine="sum", **changes: options(combine, **{"method": "sts", "ratio": 0.25, **changes})


@COMBINE
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_tokens": 9}, {"min_tokens": 20}, {"rule": "top_p"}, {"ratio": 1.0}],
    ids=str,
)
def test_each_head_gets_the_selection_of_its_own_query_heads(
    draft_of, per_head, make, sources, tokens, combine, changes
):
    draft, opts = draft_of(*LENS), per_head(combine, **changes)
    capture = make(opts)
    draft.run(capture, [True] * 3)
    bits, prefix_lens = capture.select()
    assert bits.shape == (2, 3, KV_HEADS, 3)
    assert prefix_lens.tolist() == [n - 1 for n in LENS]
    for (s, name), r, g in itertools.product(enumerate(sources), range(3), range(KV_HEADS)):
        assert tokens(bits[s, r, g]) == draft.selection(opts, name, r, g), (name, r, g)


@COMBINE
def test_heads_differ_from_each_other_and_from_the_layer(draft_of, per_head, sources, combine):
    # Otherwise the test above could not tell them apart.
    draft, opts = draft_of(*LENS), per_head(combine)
    for name in sources:
        assert len({frozenset(draft.selection(opts, name, 0, g)) for g in (None, 0, 1)}) == 3


@COMBINE
def test_a_head_s_mass_sums_to_one_at_most(draft_of, per_head, make, combine):
    draft, capture = draft_of(*LENS), make(per_head(combine))
    draft.run(capture, [True] * 3)
    sums = [capture.ranking.mass[:, r, :, : n - 1].sum(-1) for r, n in enumerate(LENS)]
    assert torch.stack(sums).max() <= 1 + 1e-5
    assert torch.stack(sums).max() > 0.2


def test_rows_that_are_not_wanted_get_nothing(draft_of, per_head, make, sources, tokens):
    draft, opts = draft_of(*LENS), per_head()
    capture = make(opts)
    capture.ranking._bits.fill_(-1)
    draft.run(capture, [False, True, False])
    bits, prefix_lens = capture.select()
    assert prefix_lens.tolist() == [0, 32, 0]
    assert not bits[:, [0, 2]].any()
    assert tokens(bits[0, 1, 1]) == draft.selection(opts, sources[0], 1, 1)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set from the start")
@COMBINE
def test_the_kernels_select_the_same(new_draft, per_head, make, sources, tokens, combine):
    draft, opts = new_draft([20, 33]), per_head(combine)
    capture = make(opts, executor="triton")
    draft.run(capture, [True, True])
    bits, _ = capture.select()
    for (s, name), r, g in itertools.product(enumerate(sources), range(2), range(KV_HEADS)):
        assert tokens(bits[s, r, g]) == draft.selection(opts, name, r, g), (name, r, g)


def test_its_size_is_that_of_its_buffers(per_head, make):
    requests, words = 5, 3
    scores = requests * HEADS * (MAX_LEN + 1)  # with their logsumexp
    row = MAX_LEN + words + 1  # mass, bits, their count
    rest = 8 * requests + 4 * (requests + 1)
    assert make(per_head()).nbytes == 4 * (scores + requests * 2 * KV_HEADS * row) + rest

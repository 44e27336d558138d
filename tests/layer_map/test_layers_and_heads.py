"""What a layer map says of layers, and of heads on the ranks of tensor parallelism."""

from __future__ import annotations

import pytest

from specattn_vllm.layer_map import LayerMap, LayerMapError, uniform


@pytest.mark.parametrize("m", [1, 2, 5, 16, 28, 32, 33])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 40])
def test_uniform_pairs_by_depth(m, n, facts):
    found = uniform(facts(m), facts(n))
    assert not found.calibrated
    assert found.layers[0] is None
    rest = list(found.layers[1:])
    assert len(rest) == m - 1
    assert all(0 <= i < n for i in rest)
    assert rest == sorted(rest)
    # Relative depths agree to within a draft layer.
    assert all(abs(i / n - j / m) <= 1 / n for j, i in enumerate(rest, start=1))


def test_dense_layers_are_taken_out(pair):
    found = uniform(pair.target, pair.draft)
    assert found.layers == (None, 0, 1, 1)
    assert found.with_dense((3, 1)).layers == (None, None, 1, None)
    assert found.with_dense(()).layers == found.layers
    assert found.layers == (None, 0, 1, 1), "the map itself stays"


def test_dense_layers_are_taken_out_of_the_head_map_too(with_heads):
    found = LayerMap.model_validate(with_heads()).with_dense((3, 1))
    assert (found.layers, found.heads) == ((None, None, 1, None), (None, None, (1, 1), None))


def test_a_dense_layer_the_target_does_not_have_is_refused(pair):
    with pytest.raises(LayerMapError, match="dense_layers contains 4, but the target has layers 0 to 3: remove it"):
        uniform(pair.target, pair.draft).with_dense((1, 4))


def test_sources_are_the_captured_draft_layers_ascending(facts, content):
    found = LayerMap.model_validate(content(draft=facts(5).model_dump(), layers=[4, None, 2, 4]))
    assert found.sources == (2, 4)
    assert found.with_dense((2,)).sources == (4,)
    assert found.with_dense((0, 2, 3)).sources == ()


# Heads on ranks


@pytest.fixture
def paired(facts, content):
    def paired(ours: int, theirs: int, heads=None) -> LayerMap:
        """Target layers 1 and 2 are mapped; `heads`: the map of both."""
        changes = {} if heads is None else {"method": "sts", "heads": [None, heads, heads]}
        target, draft = facts(3, num_key_value_heads=ours), facts(2, num_key_value_heads=theirs)
        layers = [None, 0, 1]
        return LayerMap.model_validate(
            content(target=target.model_dump(), draft=draft.model_dump(), layers=layers, **changes)
        )

    return paired


def test_one_rank_has_the_whole_map(paired):
    assert paired(3, 2, [1, 0, 1]).local_heads(0, 1) == (None, (1, 0, 1), (1, 0, 1))


@pytest.mark.parametrize(("ours", "theirs"), [(8, 8), (8, 4), (4, 8), (8, 2), (2, 8), (6, 4)])
def test_heads_paired_by_proportion_are_on_the_same_rank(ours, theirs, paired):
    found = paired(ours, theirs)
    [whole] = {row for row in found.local_heads(0, 1) if row is not None}
    assert whole == tuple(h * theirs // ours for h in range(ours))
    ranks = [found.local_heads(rank, 2)[1] for rank in range(2)]
    assert ranks[0] + tuple(g + theirs // 2 for g in ranks[1]) == whole


def test_a_rank_numbers_its_own_heads(paired):
    found = paired(4, 4, [1, 1, 2, 3])
    assert found.local_heads(0, 2) == (None, (1, 1), (1, 1))
    assert found.local_heads(1, 2) == (None, (0, 1), (0, 1))


@pytest.mark.parametrize(
    ("ours", "theirs", "side", "count"), [(3, 2, "target", 3), (4, 3, "draft", 3), (1, 2, "target", 1)]
)
def test_heads_that_do_not_divide_among_the_ranks_are_refused(ours, theirs, side, count, paired):
    with pytest.raises(LayerMapError, match=f"parallel_size = 2 does not divide the {count} KV heads of the {side}"):
        paired(ours, theirs).local_heads(0, 2)


def test_a_head_of_another_rank_is_refused_with_the_remedy(paired):
    found = paired(4, 4, [0, 2, 2, 3])
    assert found.local_heads(1, 2) == (None, (0, 1), (0, 1))
    message = r"heads\[1\]\[1\] = 2 of the layer map.*within each rank.*layer_map='uniform'"
    with pytest.raises(LayerMapError, match=message):
        found.local_heads(0, 2)

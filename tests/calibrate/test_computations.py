"""What a calibration computes, against plain references: similarities and the maps that follow from them."""

import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from specattn_vllm.calibrate.maps import head_map, layer_path  # noqa: E402
from specattn_vllm.calibrate.similarity import EPSILON, jaccard, negative_kl, retained  # noqa: E402


def distributions(layers, lengths, keys, seed):
    """Causal attention rows: [layers, len(lengths), keys], each a distribution over its first `length` keys."""
    scores = 3 * torch.randn(layers, len(lengths), keys, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.arange(keys) >= lengths[:, None], float("-inf")).softmax(-1)


def test_similarity_is_minus_kl_over_the_visible_keys():
    lengths = torch.tensor([1, 5, 12])
    a, b = distributions(3, lengths, 12, 0), distributions(2, lengths, 12, 1)
    want = np.zeros((3, 2))
    for j, i, r in itertools.product(range(3), range(2), range(3)):
        keys = int(lengths[r])
        p, q = ((x[:keys].double().numpy() + EPSILON) / (1 + EPSILON * keys) for x in (a[j, r], b[i, r]))
        want[j, i] -= (p * np.log(p / q)).sum()
    np.testing.assert_allclose(negative_kl(a, b, lengths).numpy(), want, rtol=1e-9)


def test_equal_layers_score_zero_and_others_less():
    lengths = torch.tensor([4, 9])
    found = negative_kl(a := distributions(3, lengths, 9, 2), a, lengths)
    assert torch.allclose(found.diagonal(), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert (found[~torch.eye(3, dtype=torch.bool)] < -0.01).all()


def test_a_zero_of_the_draft_costs_a_finite_amount():
    lengths = torch.tensor([2])
    sure, other = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert negative_kl(sure, other, lengths).item() == pytest.approx(np.log(EPSILON), rel=1e-3)


@pytest.mark.parametrize("ties", [False, True])
def test_path_against_all_maps_that_never_step_back(ties):
    rng = np.random.default_rng(0)
    for m, n in itertools.product(range(1, 6), range(1, 5)):
        every = [*itertools.combinations_with_replacement(range(n), m)]
        for _ in range(5):
            s = rng.integers(-2, 1, (m, n)).astype(float) if ties else -rng.exponential(size=(m, n))
            totals = {layers: sum(s[j, i] for j, i in enumerate(layers)) for layers in every}
            found = tuple(layer_path(torch.from_numpy(s)))
            assert found in totals, "it steps back"
            assert totals[found] == pytest.approx(max(totals.values()))
            if ties:
                best = [layers for layers, total in totals.items() if total == max(totals.values())]
                assert found == min(best, key=lambda layers: layers[::-1])


def test_paths_that_can_be_told_by_eye():
    assert layer_path(torch.eye(3)) == [0, 1, 2]
    assert layer_path(-torch.ones(4, 3)) == [0, 0, 0, 0]
    # Alone, the first target layer would get draft layer 1 and the second draft layer 0.
    assert layer_path(torch.tensor([[0.0, 1.0], [3.0, 0.0]])) == [0, 0]


@pytest.mark.parametrize("top", [1, 4, 12, 50])
def test_jaccard_is_that_of_the_most_attended_keys(top):
    lengths = torch.tensor([2, 5, 12])
    a, b = distributions(3, lengths, 12, 2), distributions(2, lengths, 12, 3)

    def best(row, keys):
        return set(sorted(range(keys), key=lambda k: -row[k])[:top])

    want = np.zeros((3, 2))
    for h, d, r in itertools.product(range(3), range(2), range(3)):
        p, q = (best(x[r].tolist(), int(lengths[r])) for x in (a[h], b[d]))
        want[h, d] += len(p & q) / len(p | q)
    np.testing.assert_allclose(jaccard(a, b, lengths, top).numpy(), want, rtol=1e-9)


def test_head_map_takes_the_most_similar_and_of_equals_the_first():
    similarity = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.5, 0.4], [0.0, 0.0, 0.0]])
    assert head_map(similarity) == [1, 0, 0]


def test_head_map_within_ranks_stays_there():
    similarity = torch.tensor([[0.1, 0.2, 0.3, 0.9], [0.9, 0.2, 0.3, 0.9], [0.9, 0.1, 0.2, 0.3], [0.1, 0.9, 0.3, 0.2]])
    assert head_map(similarity) == [3, 0, 0, 1]
    assert head_map(similarity, ranks=2) == [1, 0, 3, 2]
    assert head_map(similarity, ranks=4) == [0, 1, 2, 3]
    assert head_map(similarity[:, :2], ranks=2) == [0, 0, 1, 1]


@pytest.mark.parametrize("budget", [0.01, 0.3, 1.0])
def test_retained_is_the_mass_on_the_keys_that_the_other_attends_to_most(budget):
    lengths = torch.tensor([5, 9, 2])
    ours, theirs = distributions(2, lengths, 9, seed=1), distributions(3, lengths, 9, seed=2)
    found = retained(ours, theirs, lengths, budget)
    want = torch.zeros(2, 3, dtype=torch.float64)
    for a, b, row in itertools.product(range(2), range(3), range(3)):
        visible = int(lengths[row])
        ranked = sorted(range(visible), key=lambda key: -float(theirs[b, row, key]))
        want[a, b] += sum(float(ours[a, row, key]) for key in ranked[: math.ceil(budget * visible)])
    torch.testing.assert_close(found, want)
    if budget == 1.0:
        torch.testing.assert_close(found, torch.full((2, 3), 3.0, dtype=torch.float64))

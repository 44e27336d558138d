"""What a calibration computes, against plain references: similarities, maps, rounds, shares."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from specattn_vllm.calibrate.arguments import PATHS  # noqa: E402
from specattn_vllm.calibrate.paths import head_map, layer_path  # noqa: E402
from specattn_vllm.calibrate.rounds import Rounds  # noqa: E402
from specattn_vllm.calibrate.shares import cost_at, divide, hull, least_budget, relative  # noqa: E402
from specattn_vllm.calibrate.similarity import EPSILON, jaccard, negative_kl  # noqa: E402


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


def test_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match="differ"):
        negative_kl(torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.tensor([3, 3]))


def allowed(rule, layers):
    """Whether a rule allows a map, told anew."""
    return rule == "free" or all(a <= b for a, b in itertools.pairwise(layers))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rule", PATHS)
def test_path_against_all_maps(rule, ties):
    rng = np.random.default_rng(0)
    for m, n in itertools.product(range(1, 6), range(1, 5)):
        every = [layers for layers in itertools.product(range(n), repeat=m) if allowed(rule, layers)]
        for _ in range(5):
            s = rng.integers(-2, 1, (m, n)).astype(float) if ties else -rng.exponential(size=(m, n))
            totals = {layers: sum(s[j, i] for j, i in enumerate(layers)) for layers in every}
            found = tuple(layer_path(s.tolist(), rule))
            assert found in totals, "the rule does not allow it"
            assert totals[found] == pytest.approx(max(totals.values()))
            if ties:
                best = [layers for layers, total in totals.items() if total == max(totals.values())]
                assert found == min(best, key=lambda layers: layers[::-1])


def test_path_of_a_tensor_and_of_nonsense():
    assert layer_path(torch.eye(3)) == [0, 1, 2]
    assert layer_path(-torch.ones(4, 3)) == [0, 0, 0, 0]
    for bad in ([], [[]], [[1.0], [1.0, 2.0]], [[float("nan")]]):
        with pytest.raises(ValueError):
            layer_path(bad)


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
    with pytest.raises(ValueError, match="3 ranks do not divide 4 target heads and 4 draft heads"):
        head_map(similarity, ranks=3)


ROUNDS = Rounds(window=40, count=3, steps=2, sink_tokens=2, recent_tokens=5)


def test_rounds_lie_at_the_end_of_the_window():
    assert ROUNDS.rows == 9
    assert ROUNDS.contexts().tolist() == [31, 34, 37]


def test_mass_of_a_round_is_its_draft_steps_and_the_last_one_moved_on():
    attention = distributions(2, torch.arange(31, 40) + 1, 40, 5)
    found = ROUNDS.mass(attention).numpy()
    a = attention.numpy()
    want = np.zeros((2, 3, 40))
    for g, r in itertools.product(range(2), range(3)):
        context, first, last = 31 + 3 * r, a[g, 3 * r], a[g, 3 * r + 1]
        for key in range(context):
            want[g, r, key] = (first[key] + last[key] + (last[key - 1] if key else 0)) / 3
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_kept_tokens_are_the_heaviest_beside_those_always_kept(share):
    mass = ROUNDS.mass(distributions(2, torch.arange(31, 40) + 1, 40, 6))
    keep = ROUNDS.keep(ROUNDS.ranks(mass), share)
    for g, r in itertools.product(range(2), range(3)):
        context = 31 + 3 * r
        always = {*range(2), *range(context - 5, context)}
        others = sorted(set(range(context)) - always, key=lambda k: (-mass[g, r, k].item(), k))
        want = always | set(others[: max(0, int(np.ceil(context * share)) - len(always))])
        assert set(keep[g, r].nonzero().flatten().tolist()) == want


def test_rows_see_their_selection_and_their_own_round_up_to_themselves():
    keep = ROUNDS.keep(ROUNDS.ranks(ROUNDS.mass(distributions(1, torch.arange(31, 40) + 1, 40, 7))), 0.3)
    masks = ROUNDS.masks(keep)
    assert masks.shape == (1, 9, 40)
    for row in range(9):
        context, position = 31 + 3 * (row // 3), 31 + row
        want = set(keep[0, row // 3].nonzero().flatten().tolist()) | set(range(context, position + 1))
        assert set(masks[0, row].nonzero().flatten().tolist()) == want
    everything = ROUNDS.masks(ROUNDS.keep(ROUNDS.ranks(torch.zeros(1, 3, 40)), 1.0))
    assert torch.equal(everything[0], torch.arange(40) <= torch.arange(31, 40)[:, None])


def test_hull_leaves_out_what_is_never_worth_it():
    points = [(0.1, 1.0), (0.2, 0.9), (0.3, 0.2), (0.5, 0.3), (0.6, 0.1), (1.0, 0.0)]
    assert hull(points) == [(0.1, 1.0), (0.3, 0.2), (0.6, 0.1), (1.0, 0.0)]
    assert hull([(1.0, 0.0), (0.5, 0.0), (0.2, 0.0)]) == [(0.2, 0.0)]
    assert hull([(0.0, 2.0), (0.5, 1.0), (1.0, 0.0)]) == [(0.0, 2.0), (1.0, 0.0)]


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.25, 0.5, 1.0])
def test_division_costs_least_among_all_on_a_fine_grid(budget):
    rng = np.random.default_rng(1)
    grid = np.arange(1, 21) / 20
    curves = []
    for scale in (0.2, 1.0, 5.0):
        costs = scale * np.sort(rng.exponential(size=20))[::-1]
        curves.append([*zip(grid, costs - costs[-1], strict=True)])
    shares = divide(curves, budget)
    assert sum(shares) == pytest.approx(3 * budget)
    hulls = [hull(points) for points in curves]
    ours = sum(map(cost_at, hulls, shares))
    for x, y in itertools.product(np.linspace(0.05, 1, 39), repeat=2):
        if 0.05 <= (z := 3 * budget - x - y) <= 1:
            assert ours <= sum(map(cost_at, hulls, (x, y, z))) + 1e-9


@pytest.mark.parametrize("goal", [0.02, 0.1, 0.3])
def test_the_least_budget_that_loses_no_more(goal):
    curves = [[(0.1, 0.5), (0.3, 0.2), (1.0, 0.0)], [(0.1, 0.3), (0.2, 0.28), (1.0, 0.0)], [(0.1, 0.05), (1.0, 0.0)]]
    lost = [[(share, cost / 2) for share, cost in points] for points in curves]

    def loses(budget: float) -> float:
        return sum(map(cost_at, lost, divide(curves, budget))) / 3

    found = least_budget(curves, lost, goal)
    assert loses(found) <= goal and (found == 0 or loses(found - 0.001) > goal)
    assert least_budget(curves, lost, 0.0) == 1


def test_division_outside_what_can_be_read():
    curves = [[(0.1, 1.0), (1.0, 0.0)], [(0.1, 3.0), (0.4, 0.0), (1.0, 0.0)]]
    assert divide(curves, 0.02) == [0.1, 0.1]
    assert divide(curves, 0.2) == pytest.approx([0.1, 0.3])
    assert divide(curves, 1.0) == pytest.approx([1.0, 0.4])  # the second gains nothing from more


def test_relative_shares_are_one_on_average_and_never_nothing():
    assert relative([0.125, 0.375]) == [0.5, 1.5]
    assert min(relative([1e-7, 1.0])) == 0.001


def test_cost_between_and_beside_the_measured_points():
    points = [(0.2, 1.0), (0.4, 0.5), (1.0, 0.0)]
    assert [cost_at(points, x) for x in (0.1, 0.2, 0.3, 0.4, 1.0)] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.0])

"""What of the target's attention a draft layer's choice retains, and the maps that are made by it."""

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from specattn_vllm.calibrate.paths import head_map, layer_path  # noqa: E402
from specattn_vllm.calibrate.retained import choices, retained, retained_of_window  # noqa: E402
from specattn_vllm.calibrate.rounds import Rounds  # noqa: E402
from specattn_vllm.calibrate.similarity import negative_kl  # noqa: E402

ROUNDS = Rounds(window=60, count=3, steps=2, sink_tokens=2, recent_tokens=5)
ROWS = torch.arange(51, 60)


def rows_on(weights: dict[int, float]) -> torch.Tensor:
    """[1, rows, window]: every row puts these weights on these tokens, and what is left on all that it sees, evenly."""
    seen = torch.arange(60) <= ROWS[:, None]
    rows = (1 - sum(weights.values())) * seen / seen.sum(-1, keepdim=True)
    for token, weight in weights.items():
        rows[:, token] += weight
    return rows[None]


def attention(heads: int, seed: int) -> torch.Tensor:
    scores = 3 * torch.randn(heads, 9, 60, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.arange(60) > ROWS[:, None], float("-inf")).softmax(-1)


def test_the_flat_layer_is_the_most_alike_by_kl_and_another_retains_more():
    """The target looks at four tokens. Draft layer 0 looks everywhere. Layer 1 looks at three of the four, beside a lot
    that it alone attends to, and at the rest hardly at all: in nats that is far off, and the choice is right."""
    target = rows_on({10: 0.2, 20: 0.2, 30: 0.2, 40: 0.2})
    flat = rows_on({})
    right = rows_on({10: 0.1, 20: 0.1, 30: 0.1, 1: 0.7 - 1e-6})
    draft = torch.cat((flat, right))
    by_kl = negative_kl(target, draft, ROWS + 1)
    by_mass = torch.stack([retained(ROUNDS, target, choices(ROUNDS, layer[None], 0.2))[0, 0] for layer in draft])[None]
    assert layer_path(by_kl) == [0] and layer_path(by_mass) == [1]
    # Three tokens of 0.2 are chosen, and the choice of the flat layer, the first tokens, has one of them at most.
    assert by_mass[0, 1] > 0.6 and by_mass[0, 0] < 0.45


@pytest.mark.parametrize(("share", "least"), [(0.05, 0), (0.2, 0), (0.2, 20), (1.0, 0)])
def test_retained_is_the_mass_on_the_choice_and_on_the_round_itself(share, least):
    rounds = Rounds(60, 3, 2, 2, 5, min_tokens=least)
    ours, theirs = attention(2, 0), attention(3, 1)
    found = retained(rounds, ours, choices(rounds, theirs, share))
    assert found.shape == (2, 3) and found.dtype == torch.float64
    for h, d in itertools.product(range(2), range(3)):
        total = 0.0
        for r in range(3):
            context, first = 51 + 3 * r, 3 * r
            mass = [theirs[d, first, k] + theirs[d, first + 1, k] + (theirs[d, first + 1, k - 1] if k else 0)
                    for k in range(context)]  # fmt: skip
            always = [*range(2), *range(context - 5, context)]
            order = sorted({*range(context)} - {*always}, key=lambda k: (-mass[k], k))
            wanted = max(-(-context * share // 1), least)
            kept = [*always, *order[: max(0, int(wanted) - len(always))]]
            for row in range(first, first + 3):
                total += ours[h, row, kept].sum() + ours[h, row, context : 51 + row + 1].sum()
        assert found[h, d].item() == pytest.approx(total.item() / 9, rel=1e-5)
    if share == 1.0:
        torch.testing.assert_close(found, torch.ones(2, 3, dtype=torch.float64), rtol=1e-6, atol=0)


def test_short_contexts_read_everything_up_to_the_floor():
    rounds = Rounds(60, 3, 2, 2, 5, min_tokens=58)
    found = retained(rounds, attention(1, 0), choices(rounds, attention(1, 1), 0.01))
    torch.testing.assert_close(found, torch.ones(1, 1, dtype=torch.float64), rtol=1e-6, atol=0)


def test_of_layers_and_heads_that_retain_as_much_the_first_is_taken():
    ours, theirs = attention(2, 0), attention(1, 1).expand(3, -1, -1)
    heads = retained(ROUNDS, ours, choices(ROUNDS, theirs, 0.2))
    assert (heads == heads[:, :1]).all() and head_map(heads) == [0, 0]
    for path in ("free", "monotone"):
        assert layer_path(heads, path) == [0, 0]


def test_what_is_retained_of_a_window_is_that_of_eager_attention(pair, load, eager):
    rounds, share = Rounds(256, 3, 4, 4, 8, min_tokens=20), 0.2
    ids = torch.randint(2, 258, (256,), generator=torch.Generator().manual_seed(4))
    of_pair = [load(pair / name) for name in ("target", "draft")]
    rows = []
    for name in ("target", "draft"):
        with torch.inference_mode():
            seen = eager(pair / name)(input_ids=ids[None], output_attentions=True).attentions
        rows.append([layer[0, :, -15:].unflatten(0, (2, 2)).mean(1) for layer in seen])
    found = retained_of_window(*of_pair, ids, rounds, share, ("layers", "heads"))
    assert found["layers"].shape == (3, 2) and found["heads"].shape == (3, 2, 2, 2)
    for (j, ours), (i, theirs) in itertools.product(enumerate(rows[0]), enumerate(rows[1])):
        want = retained(rounds, ours, choices(rounds, theirs, share))
        torch.testing.assert_close(found["heads"][j, i], want, rtol=1e-4, atol=1e-5)
        layer = retained(rounds, ours.mean(0)[None], choices(rounds, theirs.mean(0)[None], share))
        torch.testing.assert_close(found["layers"][j, i], layer[0, 0], rtol=1e-4, atol=1e-5)
    assert found["layers"].std() > 0.001, "layers that all retain as much would make any map pass"

"""What is measured in a window, against plain loops over the rows of eager attention."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from specattn_vllm.calibrate import measure, similarity  # noqa: E402
from specattn_vllm.calibrate.rounds import Rounds  # noqa: E402
from specattn_vllm.calibrate.shares import GRID  # noqa: E402


@pytest.mark.parametrize("heads", [None, [[1, 0], None, [0, 0]]])
def test_cost_of_a_window_falls_with_what_is_read(pair, heads, load, eager):
    rounds = Rounds(256, 3, 4, 4, 8)
    ids = torch.randint(2, 258, (256,), generator=torch.Generator().manual_seed(2))
    target = load(pair / "target")
    none = [False] * 3
    chosen = measure.Chosen.by(load(pair / "draft"), ids, rounds, [0, None, 1], heads)
    found = measure.cost_of_window(target, chosen, none, True)
    for values in found.values():
        assert values.shape == (3, len(GRID)) and not values[1].any()
    contexts = (241, 246, 251)
    kept = torch.tensor([[max(12, -(-context * share // 1)) / context for share in GRID] for context in contexts])
    for layer in (0, 2):
        torch.testing.assert_close(found["read"][layer], kept.mean(0).double(), rtol=1e-6, atol=1e-6)
        assert (found["mass"][layer].diff() > -1e-6).all() and found["mass"][layer, -1] < 1
        assert found["kl"][layer, 0] > found["kl"][layer, -1] > 0

    # The target's rows, from eager attention: what is kept of them at one share.
    shares = dict(zip(GRID, range(len(GRID)), strict=True))
    ranks = {}
    load(pair / "draft").look(ids, torch.arange(241, 256), lambda i, rows: ranks.__setitem__(
        i, rounds.ranks(rounds.mass(rows if heads else rows.mean(0, keepdim=True)))))  # fmt: skip
    chosen = ranks[1] if heads is None else ranks[1][heads[2]]
    with torch.inference_mode():
        rows = eager(pair / "target")(input_ids=ids[None], output_attentions=True).attentions[2][0, :, -15:]
    want = (rows.unflatten(0, (2, 2)).mean(1) * rounds.masks(rounds.keep(chosen, 0.25))).sum(-1).mean()
    assert found["mass"][2, shares[0.25]].item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("heads", [None, [[1, 0], None, [0, 0]]])
def test_what_a_layer_retains_with_what_follows_the_rounds_tokens(pair, heads, load):
    rounds, layers, share = Rounds(256, 3, 4, 4, 8), [0, None, 1], 0.2
    ids = torch.randint(2, 30, (256,), generator=torch.Generator().manual_seed(2))
    target, draft = load(pair / "target"), load(pair / "draft")
    found = measure.induction_of_window(target, measure.Chosen.by(draft, ids, rounds, layers, heads), share)
    rows = {name: {} for name in ("target", "draft")}
    for name, model in (("target", target), ("draft", draft)):
        model.look(ids, torch.arange(241, 256), rows[name].__setitem__)
    for layer in (0, 2):
        for name, more in (("alone", 0.0), ("followed", 0.5)):
            total = 0.0
            for r in range(3):
                context = 241 + 5 * r
                seen = rows["draft"][layers[layer]][:, 5 * r : 5 * r + 5]
                seen = seen if heads else seen.mean(0, keepdim=True)
                mass = seen[:, :4].sum(1)
                mass[:, 1:] += seen[:, 3, :-1]
                mass = mass[:, :context] / 5
                coming = set(ids[context : context + 5].tolist())
                for p in range(1, context):
                    if int(ids[p - 1]) in coming:
                        mass[:, p] += more / context
                always = {*range(4), *range(context - 8, context)}
                for head in range(2):
                    of = mass[heads[layer][head] if heads else 0].tolist()
                    order = sorted(set(range(context)) - always, key=lambda p: (-of[p], p))
                    kept = [*always, *order[: -(-context * share // 1).__int__() - len(always)]]
                    own = rows["target"][layer][head, 5 * r : 5 * r + 5]
                    total += (own[:, kept].sum() + own[:, context:].sum()).item()
            assert found[name][layer].item() == pytest.approx(total / 30, rel=1e-4), (layer, name)
        assert found["followed"][layer] != found["alone"][layer]
    assert found["alone"][1] == found["followed"][1] == 0


def test_similarity_of_a_window_is_that_of_its_rows(pair, load):
    ids = torch.randint(2, 258, (256,), generator=torch.Generator().manual_seed(3))
    queries = measure.sampled_queries(256, 16, 0, 5)
    assert queries.min() >= 16 and len(queries.unique()) == 16 and (queries.diff() > 0).all()
    assert not torch.equal(queries, measure.sampled_queries(256, 16, 0, 6))
    pair_of = {name: load(pair / name) for name in ("target", "draft")}
    found = measure.similarity_of_window(*pair_of.values(), ids, queries, "kl", ("layers", "heads"))
    rows = {name: {} for name in pair_of}
    for name, model in pair_of.items():
        model.look(ids, queries, rows[name].__setitem__)
    ours, theirs = (torch.stack([of[j] for j in sorted(of)]) for of in rows.values())
    want = similarity.negative_kl(ours.mean(1), theirs.mean(1), queries + 1) / 16
    torch.testing.assert_close(found["layers"], want)
    assert found["heads"].shape == (3, 2, 2, 2)
    torch.testing.assert_close(found["heads"][2, 1], similarity.jaccard(ours[2], theirs[1], queries + 1) / 16)

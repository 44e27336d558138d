"""What is compared in a window, against whole attention matrices of transformers."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from specattn_vllm.calibrate import similarity  # noqa: E402


def test_sampled_queries_are_of_each_window_and_see_many_keys():
    queries = similarity.sampled_queries(256, 16, 0, 5)
    assert queries.min() >= 16 and queries.max() < 256
    assert len(queries) == 16 and (queries.diff() > 0).all()
    assert torch.equal(queries, similarity.sampled_queries(256, 16, 0, 5))
    assert not torch.equal(queries, similarity.sampled_queries(256, 16, 0, 6))
    assert not torch.equal(queries, similarity.sampled_queries(256, 16, 1, 5))
    assert torch.equal(similarity.sampled_queries(64, 60, 0, 0), torch.arange(4, 64))


def test_similarity_of_a_window_is_that_of_its_rows(pair, load, eager):
    ids = torch.randint(2, 258, (256,), generator=torch.Generator().manual_seed(3))
    queries = similarity.sampled_queries(256, 16, 0, 5)
    of_pair = [load(pair / name) for name in ("target", "draft")]
    found = similarity.similarity_of_window(*of_pair, ids, queries, with_heads=True)
    seen = []
    for name in ("target", "draft"):
        with torch.inference_mode():
            layers = eager(pair / name)(input_ids=ids[None], output_attentions=True).attentions
        # Four query heads share two KV heads.
        seen.append(torch.stack([layer[0].unflatten(0, (2, 2)).mean(1)[:, queries] for layer in layers]))
    ours, theirs = seen
    want = similarity.negative_kl(ours.mean(1), theirs.mean(1), queries + 1) / 16
    torch.testing.assert_close(found["layers"], want, rtol=1e-4, atol=1e-4)
    assert want.std() > 0.01, "layers that are all as alike would make any map pass"
    assert found["heads"].shape == (3, 2, 2, 2)
    for j, i in ((0, 0), (2, 1)):
        want = similarity.jaccard(ours[j], theirs[i], queries + 1) / 16
        # Of keys that are attended to alike, rounding may choose others.
        torch.testing.assert_close(found["heads"][j, i], want, rtol=0, atol=0.01)
    by_budget = similarity.similarity_of_window(*of_pair, ids, queries, with_heads=True, budget=0.125)
    want = similarity.retained(ours[2], theirs[1], queries + 1, 0.125) / 16
    torch.testing.assert_close(by_budget["heads"][2, 1], want, rtol=0, atol=0.01)
    want = similarity.retained(ours.mean(1), theirs.mean(1), queries + 1, 0.125) / 16
    torch.testing.assert_close(by_budget["layers"], want, rtol=0, atol=0.01)
    alone = similarity.similarity_of_window(*of_pair, ids, queries, with_heads=False)
    assert torch.equal(alone.pop("layers"), found["layers"]) and not alone

"""What is seen of a model while it attends, against transformers' eager attention."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from specattn_vllm.calibrate import models  # noqa: E402

IDS = torch.randint(2, 258, (70,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_rows_are_those_of_eager_attention(architecture, tmp_path, make_model, load, eager):
    folder = make_model(tmp_path / "model", 2, architecture)
    queries = torch.tensor([0, 3, 20, 69])
    found = []
    models.look(load(folder), IDS, queries, found.append)
    with torch.inference_mode():
        want = eager(folder)(input_ids=IDS[None], output_attentions=True).attentions
    assert len(found) == len(want) == 2
    for rows, attention in zip(found, want, strict=True):
        # Four query heads share two KV heads.
        mean = attention[0].unflatten(0, (2, 2)).mean(1)[:, queries]
        torch.testing.assert_close(rows, mean, rtol=1e-4, atol=1e-6)


def test_rows_come_out_the_same_in_blocks(monkeypatch):
    query, key = torch.randn(4, 70, 16), torch.randn(2, 70, 16)
    whole = models.rows_of(query, key, torch.arange(70), 0.25)
    monkeypatch.setattr(models, "BLOCK", 32)
    torch.testing.assert_close(models.rows_of(query, key, torch.arange(70), 0.25), whole)

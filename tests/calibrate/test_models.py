"""What is seen of a model while it attends, and its passes that read less, against transformers' eager attention."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from specattn_vllm.calibrate import models  # noqa: E402

IDS = torch.randint(2, 258, (70,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_rows_are_those_of_eager_attention(architecture, tmp_path, make_model, load, eager):
    folder = make_model(tmp_path / "model", 2, architecture)
    queries = torch.tensor([0, 3, 20, 69])
    found = {}
    load(folder).look(IDS, queries, found.__setitem__)
    with torch.inference_mode():
        want = eager(folder)(input_ids=IDS[None], output_attentions=True).attentions
    assert sorted(found) == [0, 1]
    for layer, attention in enumerate(want):
        # Four query heads share two KV heads.
        mean = attention[0].unflatten(0, (2, 2)).mean(1)[:, queries]
        torch.testing.assert_close(found[layer], mean, rtol=1e-4, atol=1e-6)


def test_rows_come_out_the_same_in_blocks(monkeypatch):
    query, key = torch.randn(4, 70, 16), torch.randn(2, 70, 16)
    whole = models.rows_of(query, key, torch.arange(70), 0.25)
    monkeypatch.setattr(models, "BLOCK", 32)
    torch.testing.assert_close(models.rows_of(query, key, torch.arange(70), 0.25), whole)


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_pruned_pass_is_the_model_with_one_layers_attention_masked(
    architecture, groups, tmp_path, make_model, load, eager
):
    """Against the whole window through eager attention, that layer's mask replaced."""
    folder, rest = make_model(tmp_path / "model", 3, architecture), 12
    masks = torch.rand(groups, rest, 70, generator=torch.Generator().manual_seed(1)) < 0.3
    masks |= torch.eye(70, dtype=torch.bool)[-rest:]
    masks &= torch.arange(70) <= torch.arange(58, 70)[:, None]
    model = load(folder)
    dense = model.reference(IDS, rest, lambda layer, rows: None)
    pruned = model.pruned(IDS, rest, {1: masks})

    whole = eager(folder)
    heads = (torch.arange(70) <= torch.arange(70)[:, None]).repeat(4, 1, 1)
    heads[:, -rest:] = masks.repeat_interleave(4 // groups, 0)
    added = torch.zeros(1, 4, 70, 70).masked_fill(~heads, float("-inf"))

    def replace(module, args, kwargs):
        return args, kwargs | {"attention_mask": added}

    with torch.inference_mode():
        torch.testing.assert_close(dense, whole(IDS[None]).logits[0, -rest:].log_softmax(-1), rtol=1e-4, atol=1e-4)
        whole.model.layers[1].self_attn.register_forward_pre_hook(replace, with_kwargs=True)
        want = whole(IDS[None]).logits[0, -rest:].log_softmax(-1)
    torch.testing.assert_close(pruned, want, rtol=1e-4, atol=1e-4)
    assert (pruned - dense).abs().max() > 0.01, "the mask took nothing away"
    torch.testing.assert_close(model.pruned(IDS, rest, {}), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_a_pass_that_begins_at_the_pruned_layer_is_the_whole_one_to_the_bit(architecture, tmp_path, make_model, load):
    model, rest = load(make_model(tmp_path / "model", 4, architecture)), 12
    rows = torch.arange(58, 70)
    causal = (torch.arange(70) <= rows[:, None])[None]
    mask = causal & ((torch.arange(70) % 2 == 0) | (torch.arange(70) >= 58))
    model.reference(IDS, rest, lambda layer, rows: None)
    for masks in ({0: mask}, {2: mask}, {3: mask}, {3: mask, 1: mask}):
        found = model.pruned(IDS, rest, masks)
        model._pass = models.Pass(masks=masks, causal=causal)
        with torch.inference_mode():
            whole = model.model(input_ids=IDS[None, -rest:], position_ids=rows[None], use_cache=False).logits[0]
        assert torch.equal(found, whole.log_softmax(-1)), masks

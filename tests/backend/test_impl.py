"""What a layer's attention may have, and what is refused by name when the layer is made."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from specattn_vllm.backend import impl
from specattn_vllm.executors import ExecutorError
from specattn_vllm.kernels.contracts import HEAD_SIZES
from specattn_vllm.methods import METHODS
from specattn_vllm.selection.pages import page_strides


@pytest.fixture
def layer(monkeypatch):
    """layer(method, **arguments): the implementation of a layer of four heads of 64, on a CPU."""

    def make(method: str, size: int = 64, **arguments):
        config = SimpleNamespace(
            additional_config={"specattn": {"method": method, "executor": "torch"}},
            device_config=SimpleNamespace(device="cpu"),
            model_config=SimpleNamespace(dtype=torch.float32),
            cache_config=SimpleNamespace(cache_dtype="auto"),
        )
        monkeypatch.setattr(impl, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(impl.SpecAttnImpl, "sketch_bits", 0)
        return impl.SpecAttnImpl(4, size, 0.125, num_kv_heads=2, **arguments)

    return make


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"alibi_slopes": [1.0]}, "ALiBi slopes"),
        ({"sliding_window": 128}, "a sliding window"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "a KV cache shared between layers"),
        ({"attn_type": "encoder"}, "an attention type other than decoder"),
        ({"use_bananas": True}, "use_bananas"),
    ],
)
def test_what_no_method_computes_is_refused(layer, arguments, what):
    with pytest.raises(NotImplementedError, match=f"does not support models with {what} .* serve this model with vLLM"):
        layer("sketch", **arguments)
    assert layer("sketch", **dict.fromkeys(arguments) | {"attn_type": "decoder"}).sinks is None


@pytest.mark.parametrize("method", METHODS)
def test_sinks_and_soft_caps_are_for_methods_that_capture_no_scores(layer, method):
    sinks = torch.zeros(4)
    if method in ("sketch", "dense"):
        assert layer(method, sinks=sinks).sinks is sinks
        assert layer(method, logits_soft_cap=30.0).soft_cap == 30.0
        assert layer(method, logits_soft_cap=0).soft_cap is None, "how some models say that they have none"
        return
    for given, what in (({"sinks": sinks}, "attention sinks"), ({"logits_soft_cap": 30.0}, "a soft cap on logits")):
        with pytest.raises(NotImplementedError, match=f"models with {what} .* with method '{method}'"):
            layer(method, **given)


@pytest.mark.parametrize("part", [{"sinks": torch.zeros(4)}, {"logits_soft_cap": 30.0}])
def test_baselines_that_know_neither_are_refused(layer, part):
    """They would attend without, and be compared with what has them."""
    metadata = SimpleNamespace(hook=SimpleNamespace(attend=lambda *given: True))
    layer("sketch")._attend("layer", None, None, metadata, None)
    with pytest.raises(NotImplementedError, match="attend without sinks and soft caps"):
        layer("sketch", **part)._attend("layer", None, None, metadata, None)


def test_an_executor_without_soft_caps_is_refused_with_them(layer, monkeypatch):
    monkeypatch.setattr(
        impl.executors, "of_engine", lambda *given: SimpleNamespace(name="xformers", granularity="block")
    )
    with pytest.raises(ExecutorError, match="'xformers' knows no soft cap on logits: use 'auto' or 'triton'"):
        layer("dense", 64, logits_soft_cap=30.0)


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_an_executor_of_whole_blocks_is_refused_with_sizes_that_it_was_not_tested_with(layer, monkeypatch, size):
    assert layer("specattn", size).head_size == size
    blocks = SimpleNamespace(name="xformers", granularity="block")
    monkeypatch.setattr(impl.executors, "of_engine", lambda *given: blocks)
    if size in (64, 128):
        assert layer("specattn", size).operations is blocks
        return
    with pytest.raises(ExecutorError, match=f"'xformers' reads head sizes 64 and 128, not {size}: use 'auto' or"):
        layer("specattn", size)


def test_rows_behind_those_that_read_a_selection_read_their_own_pages(layer):
    """The first row reads all of its pages by name: then the batch is what dense attention makes of it."""
    made, lens, starts = layer("sketch"), [20, 33, 50], [0, 2, 9, 12]
    cache, query = torch.randn(12, 2, 16, 128), torch.randn(12, 4, 64)
    md = SimpleNamespace(
        num_reqs=3,
        block_table=torch.randperm(12).int().view(3, 4),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        max_query_len=7,
        max_seq_len=50,
    )
    block, per_head, token = page_strides(cache)
    p = torch.arange(lens[0])
    pages = (md.block_table[0, p // 16] * block + p % 16 * token)[None, None] + torch.arange(2)[:, None] * per_head
    step = SimpleNamespace(num_rows=1, num_tokens=2, max_query_len=2)
    wanted, found = torch.empty_like(query), torch.empty_like(query)
    made._dense(query, cache, md, wanted, first_row=0, first_token=0)
    made._read(query, cache, md, step, pages.int(), torch.full((1, 2), lens[0], dtype=torch.int32), found)
    torch.testing.assert_close(found, wanted)

"""What the sketch of one layer keeps between steps. No engine starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.kernels.sketch.contracts import Budget
from specattn_vllm.kernels.sketch.layout import SketchLayout, sketch_views
from specattn_vllm.selection.own_choice import NewEntries
from specattn_vllm.sketch.guarantee import Guarantee, Promise
from specattn_vllm.sketch.layer import LayerSketch
from specattn_vllm.sketch.step import Shape, Sketch
from specattn_vllm.stats import Counters

CPU = torch.device("cpu")
SHAPE = Shape(
    layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    dtype=torch.float32,
    element_size=4,
    max_query_len=5,
    max_num_reqs=4,
    max_model_len=512,
)


@pytest.fixture
def layer() -> LayerSketch:
    return LayerSketch(Sketch(executors.resolve("torch", CPU), Budget(0.25), 2, SHAPE, Counters(CPU), CPU), 0)


@pytest.mark.parametrize("delta, quantile", [(0.05, 1.6449), (0.001, 3.0902), (0.25, 0.6745)])
def test_a_promise_is_one_sided(delta, quantile):
    assert Promise(0.1, delta, 64).quantile == pytest.approx(quantile, abs=1e-4)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_mean_key_that_is_no_number_makes_no_centre_that_is_none(layer, number):
    """Such a centre would make every code and scale of the cache one."""
    mean = torch.randn(SHAPE.num_kv_heads, SHAPE.head_size)
    mean[0, 3] = number
    layer.set_centre(mean)
    assert layer.centre.isfinite().all() and layer.centre.any()


def cache(blocks: int) -> torch.Tensor:
    """A layer's cache, with room for a sketch after each block."""
    layout = SketchLayout(SHAPE.num_kv_heads, 16, SHAPE.head_size, 2, SHAPE.element_size)
    page = (layout.page_bytes + layout.tail_bytes) // SHAPE.element_size
    row = 2 * SHAPE.head_size
    return torch.zeros(blocks, page).as_strided((blocks, layout.heads, 16, row), (page, 16 * row, row, 1))


def test_codes_go_into_the_cache_that_is_there_now(layer):
    """vLLM allocates it twice where it profiles CUDA graphs, and the second may lie where the first did."""
    key = torch.randn(1, SHAPE.num_kv_heads, SHAPE.head_size)
    first, second = cache(3), cache(4)
    for kv_cache in (first, second):
        layer.write(NewEntries(key, key, kv_cache, torch.tensor([17])))
        codes, _ = sketch_views(kv_cache, 2)
        assert codes[1, :, 1].any() and not codes[2:].any()
    layer.forget_cache()
    assert layer.codes is None and layer.scales is None, "memory that vLLM wants back is still held"
    layer.write(NewEntries(key, key, second, torch.tensor([33])))
    assert sketch_views(second, 2)[0][2, :, 1].any()


def test_each_layer_draws_for_itself():
    """Else an unlucky sample would be that of all layers."""
    calls = []

    class ReachedError(Exception):
        pass

    def bound_lost(*given) -> None:
        raise ReachedError

    rows = torch.zeros(2, SHAPE.num_kv_heads)
    sketch = SimpleNamespace(
        guarantee=Guarantee(Promise(2.0, 0.05, 8), 80, 2, SHAPE.num_kv_heads, CPU),
        operations=SimpleNamespace(sample_unread=lambda *given: calls.append(given), bound_lost=bound_lost),
        budget=Budget(0.25, sink=4, recent=16),
        **dict.fromkeys(("cuts", "scores", "histogram", "chunks", "starts"), rows),
    )
    layer = LayerSketch.__new__(LayerSketch)
    layer.sketch, layer.index = sketch, 77
    step, batch = SimpleNamespace(num_rows=2, max_query_len=1), SimpleNamespace(scale=1.0)
    for name in ("query_start_loc", "seq_lens", "query", "kv_cache", "block_table"):
        setattr(batch, name, rows)
    with pytest.raises(ReachedError):
        layer.confirm(step, batch, rows, rows)
    [given] = calls
    assert 77 in [value for value in given if isinstance(value, int)]

"""What the sketch of one layer keeps between steps. No engine starts."""

from __future__ import annotations

from dataclasses import replace
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


@pytest.mark.parametrize("fp8", [False, True])
def test_codes_of_keys_that_were_loaded_are_those_of_keys_that_were_written(fp8):
    operations = executors.resolve("torch", CPU)
    shape = replace(SHAPE, element_size=1 if fp8 else 4)
    layer = LayerSketch(Sketch(operations, Budget(0.25), 2, shape, Counters(CPU), CPU), 0)
    layer.set_centre(torch.randn(2, 64))
    layout = SketchLayout(2, 16, 64, 2, shape.element_size)
    page = (layout.page_bytes + layout.tail_bytes) // shape.element_size
    dtype = torch.float8_e4m3fn if fp8 else torch.float32
    written, loaded = (
        torch.zeros(4 * page, dtype=torch.uint8 if fp8 else dtype)
        .view(dtype)
        .as_strided((4, 2, 16, 128), (page, 16 * 128, 128, 1))
        for _ in range(2)
    )
    key, slots = torch.randn(21, 2, 64), torch.randperm(64)[:21]
    layer.write(NewEntries(key, key, written, slots, *((0.25, 0.5) if fp8 else (1.0, 1.0))))
    loaded.view(torch.uint8 if fp8 else dtype).copy_(written.view(torch.uint8 if fp8 else dtype))
    entries = written.view(torch.uint8 if fp8 else dtype)[slots // 16, :, slots % 16].view(dtype)
    layer.note_filled(entries[..., :64], loaded, slots)
    for one, other in zip(sketch_views(written, 2), sketch_views(loaded, 2), strict=True):
        assert one.any() and torch.equal(one, other)


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

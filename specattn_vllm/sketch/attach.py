"""Joins the sketch to a model that vLLM has just loaded, before vLLM measures the memory left for the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger

from specattn_vllm import compat, executors
from specattn_vllm.backend.target_choice import counters_of, join, target_layers
from specattn_vllm.executors import Operations
from specattn_vllm.kernels.sketch.contracts import Budget
from specattn_vllm.methods.sketch import SketchOptions
from specattn_vllm.sketch.budget import budget_of
from specattn_vllm.sketch.centre import measure_centres
from specattn_vllm.sketch.guarantee import Promise, promise_of
from specattn_vllm.sketch.layer import LayerSketch
from specattn_vllm.sketch.step import Shape, Sketch
from specattn_vllm.speculation.announce import sizes
from specattn_vllm.speculation.wiring import allocated, row_width
from specattn_vllm.stats import Counters

logger = init_logger("vllm.specattn")

SHARED = {"layers": ", shared by the heads of all layers", "heads": ", shared by the heads of each layer", "none": ""}


def make_sketch(
    layers: Mapping[str, Any],
    runner: Any,
    operations: Operations,
    budget: Budget,
    bits: int,
    counters: Counters,
    max_query_len: int,
    steps_ahead: int | None = None,
    promise: Promise | None = None,
) -> tuple[Sketch, dict[str, LayerSketch]]:
    """A sketch, with its buffers, and its part for each of a model's layers, all keyed by vLLM's names. runner: vLLM's
    model runner, or our speculator."""
    impl = next(iter(layers.values())).impl
    shape = Shape(
        layers=len(layers),
        num_heads=impl.num_heads,
        num_kv_heads=impl.num_kv_heads,
        head_size=impl.head_size,
        dtype=runner.vllm_config.model_config.dtype,
        element_size=executors.cache_dtype(runner.vllm_config).itemsize,
        max_query_len=max_query_len,
        max_num_reqs=runner.max_num_reqs,
        max_model_len=row_width(runner.max_model_len),
    )
    sketch = allocated(
        lambda device: Sketch(operations, budget, bits, shape, counters, device, steps_ahead, promise), runner
    )
    return sketch, {name: LayerSketch(sketch, index) for index, name in enumerate(layers)}


def attach(runner: Any, options: SketchOptions) -> None:
    """Give the target's layers their sketch. Called when vLLM's model runner has loaded its model and its drafter."""
    operations = executors.of_engine(options, runner.device, runner.vllm_config)
    budget = budget_of(options, options.shared_budget)
    sketch, choices = make_sketch(
        target_layers(runner),
        runner,
        operations,
        budget,
        options.sketch_bits,
        counters_of(runner),
        runner.decode_query_len,
        promise=promise_of(options),
    )
    target = join(runner, options, operations, sketch, choices)
    with compat.without_adapters(runner):
        measure_centres(runner.model, choices.values(), runner.vllm_config, runner.device)
    _announce(options, sketch, target.crossover, runner.vllm_config)


def _announce(options: SketchOptions, sketch: Sketch, crossover: int, vllm_config: Any) -> None:
    budget = sketch.budget
    layout, nbytes = sketch.layout, sketch.nbytes
    logger.info(
        "specattn: each KV head reads %s%s, chosen by the step's own queries over a %d-bit copy of the keys, which "
        "adds %.1f%% to the KV cache; executor=%s, buffers %.1f MiB (%s)",
        budget.amount,
        SHARED[budget.shared] if budget.top_p is None else "",
        options.sketch_bits,
        100 * layout.tail_bytes / layout.page_bytes,
        sketch.operations.label or sketch.operations.name,
        sum(nbytes.values()) / 2**20,
        sizes(nbytes),
    )
    if sketch.guarantee is not None:
        promise = sketch.guarantee.promise
        logger.info(
            "specattn: a KV head reads everything if it may lose more than %g of a row's attention mass (confidence "
            "%g, from %d tokens that it did not read)",
            promise.epsilon,
            1 - promise.delta,
            promise.draws,
        )
    if crossover:
        logger.info(
            "specattn: batches of fewer than %d context tokens are dense, with CUDA graphs of their own",
            crossover,
        )
    spec = vllm_config.speculative_config
    drafter = "none" if spec is None else f"vLLM's {spec.method}, unchanged"
    if spec is not None and spec.uses_draft_model():
        drafter = f"a draft model, which reads {options.draft_reads}"
    logger.info("specattn: drafting: %s", drafter)

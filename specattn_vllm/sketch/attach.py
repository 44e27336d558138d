"""Joins the sketch to a model that vLLM has just loaded, before vLLM measures the memory left for the KV cache."""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger

from specattn_vllm import executors
from specattn_vllm.backend.target_choice import counters_of, join, target_layers
from specattn_vllm.methods.sketch import SketchOptions
from specattn_vllm.sketch.budget import budget_of
from specattn_vllm.sketch.centre import measure_centres
from specattn_vllm.sketch.layer import LayerSketch
from specattn_vllm.sketch.step import Shape, Sketch
from specattn_vllm.speculation.announce import sizes
from specattn_vllm.speculation.wiring import refuse_if_too_large, row_width

logger = init_logger("vllm.specattn")

SHARED = {"layers": ", shared by the heads of all layers", "heads": ", shared by the heads of each layer", "none": ""}


def attach(runner: Any, options: SketchOptions) -> None:
    """Give the target's layers their sketch. Called when vLLM's model runner has loaded its model and its drafter."""
    vllm_config = runner.vllm_config
    layers = target_layers(runner)
    operations = executors.of_engine(options, runner.device, vllm_config.model_config.dtype)
    counters = counters_of(runner)
    impl = next(iter(layers.values())).impl
    shape = Shape(
        layers=len(layers),
        num_heads=impl.num_heads,
        num_kv_heads=impl.num_kv_heads,
        head_size=impl.head_size,
        dtype=vllm_config.model_config.dtype,
        max_query_len=runner.decode_query_len,
        max_num_reqs=runner.max_num_reqs,
        max_model_len=row_width(runner.max_model_len),
    )
    budget = budget_of(options, options.shared_budget)

    def make(device: torch.device) -> Sketch:
        return Sketch(operations, budget, options.sketch_bits, shape, counters, device)

    nbytes = make(torch.device("meta")).nbytes
    refuse_if_too_large(nbytes, runner)
    sketch = make(runner.device)
    choices = {name: LayerSketch(sketch, index) for index, name in enumerate(layers)}
    target = join(runner, options, operations, sketch, choices)
    measure_centres(
        runner.model, choices.values(), vllm_config, vllm_config.model_config.get_vocab_size(), runner.device
    )
    _announce(options, sketch, target.crossover, nbytes, vllm_config)


def _announce(options: SketchOptions, sketch: Sketch, crossover: int, nbytes: dict[str, int], vllm_config: Any) -> None:
    budget = sketch.budget
    layout = sketch.layout
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

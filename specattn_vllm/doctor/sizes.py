"""What an engine would take of a device's memory, from its configuration alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig

from specattn_vllm import executors
from specattn_vllm.kernels.sketch.contracts import Budget
from specattn_vllm.layer_kinds import full_layers
from specattn_vllm.methods.budget import SketchedDraftOptions
from specattn_vllm.methods.sketch import SketchOptions
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.sketch.budget import budget_of, draft_budget_of
from specattn_vllm.sketch.step import Shape, Sketch
from specattn_vllm.speculation.wiring import row_width
from specattn_vllm.stats import Counters


def sizes(config: VllmConfig, options: SpecAttnOptions) -> dict[str, Any]:
    """Bytes of buffers, of weights and of a token's KV entries, and what the device has; all of one rank."""
    if not isinstance(options, SketchedDraftOptions):
        return {"unknown": f"buffers of method {options.method} are known once it starts: its log names them"}
    spec = config.speculative_config
    drafts = spec.num_speculative_tokens if spec is not None else 0
    model, buffers, kv, sketched, in_windows = config.model_config, {}, 0, 0, 0
    models, largest = [(model, None)], 0
    if spec is not None and spec.uses_draft_model():
        models.append((spec.draft_model_config, drafts - 1))
    for of, ahead in models:
        shape = _shape(config, of, drafts + (1 if ahead is None else 2))
        budget = draft_budget_of(options)
        if ahead is None and isinstance(options, SketchOptions):
            budget = budget_of(options, options.shared_budget)
        made = _sketch(options, budget, shape, ahead)
        if ("verification" if ahead is None else "drafting") in options.sparse_readers:
            for what, size in made.nbytes.items():
                buffers[what] = buffers.get(what, 0) + size
            largest = max(largest, sum(made.nbytes.values()))
        entries = shape.layers * shape.num_kv_heads
        kv += entries * 2 * shape.head_size * shape.dtype.itemsize
        page = 2 * shape.head_size * shape.dtype.itemsize
        if options.sketch_bits_in_cache:
            sketched += entries * made.layout.token_bytes
            page += made.layout.token_bytes
        windowed = of.get_num_layers(config.parallel_config) - shape.layers
        in_windows += windowed * shape.num_kv_heads * page * _tokens_in_a_window(config, of)
    return {
        "buffers": buffers,
        "largest": largest,
        "weights": sum(_weights(of) for of, _ in models) // config.parallel_config.tensor_parallel_size,
        "kv_per_token": kv + sketched,
        "kv_in_windows": in_windows,
        "sketch_share": sketched / (kv + sketched),
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_model_len": model.max_model_len,
        "room": _room(config),
    }


def _tokens_in_a_window(config: VllmConfig, model: ModelConfig) -> int:
    """Tokens of one request that a layer with a sliding window holds at most."""
    longest = config.model_config.max_model_len
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        return longest
    return min(longest, (model.get_sliding_window() or 0) - 1 + config.scheduler_config.max_num_batched_tokens)


def _shape(config: VllmConfig, model: ModelConfig, query_len: int) -> Shape:
    parallel = config.parallel_config
    return Shape(
        layers=full_layers(model, model.get_num_layers(parallel)),
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        dtype=config.model_config.dtype,
        max_query_len=query_len,
        max_num_reqs=config.scheduler_config.max_num_seqs,
        max_model_len=row_width(config.model_config.max_model_len),
    )


def _sketch(options: SketchedDraftOptions, budget: Budget, shape: Shape, ahead: int | None) -> Sketch:
    """On no device: its buffers have sizes and no memory."""
    cpu = torch.device("cpu")
    operations = executors.resolve("torch", cpu)
    return Sketch(
        operations, budget, options.sketch_bits, shape, Counters(cpu), torch.device("meta"), steps_ahead=ahead
    )


def _weights(model: ModelConfig) -> int:
    """Bytes of the files; 0 for a name on the hub."""
    return sum(file.stat().st_size for file in Path(model.model).glob("*.safetensors"))


def _room(config: VllmConfig) -> int:
    """Bytes of a device that vLLM would use."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory * config.cache_config.gpu_memory_utilization)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

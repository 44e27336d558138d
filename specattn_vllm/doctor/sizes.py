"""What an engine would take of a device's memory, from its configuration alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig

from specattn_vllm import executors
from specattn_vllm.doctor.states import cache_of_a_request
from specattn_vllm.kernels.sketch.contracts import Budget
from specattn_vllm.layer_kinds import full_layers, stateful_layers
from specattn_vllm.methods.budget import SketchedDraftOptions, with_sketch
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.sketch.budget import budget_of, draft_budget_of
from specattn_vllm.sketch.step import Shape, Sketch
from specattn_vllm.speculation.wiring import row_width
from specattn_vllm.stats import Counters


def sizes(config: VllmConfig, options: SpecAttnOptions) -> dict[str, Any]:
    """Bytes of buffers, of weights and of a token's KV entries, and what the device has; all of one rank."""
    with_one = with_sketch(options)
    if with_one is None:
        return {"unknown": f"buffers of method {options.method} are known once it starts: its log names them"}
    return _sizes(config, with_one)


def _sizes(config: VllmConfig, options: SketchedDraftOptions) -> dict[str, Any]:
    spec, parallel, model = config.speculative_config, config.parallel_config, config.model_config
    drafts = spec.num_speculative_tokens if spec is not None else 0
    budget = draft_budget_of(options)
    of_target = budget_of(options, options.heads_share)
    models = [(model, "verification" in options.sparse_readers, _sketch(config, options, model, of_target, drafts + 1))]
    if spec is not None and spec.uses_draft_model():
        draft = spec.draft_model_config
        of_draft = _sketch(config, options, draft, budget, drafts + 2, steps_ahead=drafts - 1)
        models.append((draft, "drafting" in options.sparse_readers, of_draft))
    choosing = [sketch.nbytes for _, chooses, sketch in models if chooses]
    kv = sketched = in_windows = in_states = stateful = 0
    for of, _, sketch in models:
        codes = sketch.layout.token_bytes if options.sketch_bits_in_cache else 0
        token = sketch.layout.kv_bytes + codes
        kv += sketch.shape.layers * sketch.num_kv_heads * token
        sketched += sketch.shape.layers * sketch.num_kv_heads * codes
        others = of.get_num_layers(parallel) - sketch.shape.layers
        if states := stateful_layers(of):
            stateful += states
            per_token = sketch.num_kv_heads * token
            taken = cache_of_a_request(config, sketch.shape.layers, states, per_token)
            in_states += taken - sketch.shape.layers * per_token * model.max_model_len
        elif not of.is_hybrid:
            in_windows += others * sketch.num_kv_heads * token * _tokens_in_a_window(config, of)
    return {
        "buffers": {what: sum(part[what] for part in choosing) for what in (choosing[0] if choosing else ())},
        "largest": max((sum(part.values()) for part in choosing), default=0),
        "weights": sum(_weights(of) for of, _, _ in models) // parallel.tensor_parallel_size,
        "kv_per_token": kv,
        "kv_in_windows": in_windows,
        "kv_in_states": in_states,
        "stateful_layers": stateful,
        "sketch_share": sketched / kv,
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


def _sketch(
    config: VllmConfig,
    options: SketchedDraftOptions,
    model: ModelConfig,
    budget: Budget,
    query_len: int,
    steps_ahead: int | None = None,
) -> Sketch:
    """On no device: its buffers have sizes and no memory."""
    parallel, cpu = config.parallel_config, torch.device("cpu")
    shape = Shape(
        layers=full_layers(model, model.get_num_layers(parallel)),
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        dtype=config.model_config.dtype,
        element_size=executors.cache_dtype(config).itemsize,
        max_query_len=query_len,
        max_num_reqs=config.scheduler_config.max_num_seqs,
        max_model_len=row_width(config.model_config.max_model_len),
    )
    operations, meta = executors.resolve("torch", cpu), torch.device("meta")
    return Sketch(operations, budget, options.sketch_bits, shape, Counters(cpu), meta, steps_ahead)


def _weights(model: ModelConfig) -> int:
    """Bytes of the files; 0 for a name on the hub."""
    return sum(file.stat().st_size for file in Path(model.model).glob("*.safetensors"))


def _room(config: VllmConfig) -> int:
    """Bytes of a device that vLLM would use."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory * config.cache_config.gpu_memory_utilization)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

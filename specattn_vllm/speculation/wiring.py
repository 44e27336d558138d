"""Joins draft and target once both are loaded: the layer map becomes a capture, a store and a pruner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from specattn_vllm import layer_map
from specattn_vllm.backend.builder import SpecAttnMetadataBuilder
from specattn_vllm.fingerprint import ModelFacts, facts_from_config
from specattn_vllm.layer_map import LayerMap
from specattn_vllm.selection.capture import DraftCapture
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.selection.pruner import Pruner
from specattn_vllm.selection.store import SelectionStore

if TYPE_CHECKING:
    from specattn_vllm.options import SpecAttnOptions
    from specattn_vllm.speculation.speculator import SpecAttnSpeculator

logger = init_logger("vllm.specattn")


@dataclass(frozen=True)
class Selection:
    """The parts that one engine's selections pass through."""

    layer_map: LayerMap
    capture: DraftCapture
    store: SelectionStore


def model_facts(model_config: ModelConfig) -> ModelFacts:
    """The facts of a model vLLM has configured; the weights' digest only for local folders."""
    folder = Path(model_config.model)
    return facts_from_config(model_config.hf_text_config, folder if folder.is_dir() else None)


def resolve_layer_map(vllm_config: VllmConfig, options: SpecAttnOptions) -> LayerMap:
    """The layer map for an engine's pair of models, with the options' dense layers."""
    target = model_facts(vllm_config.model_config)
    draft = model_facts(vllm_config.speculative_config.draft_model_config)
    found = layer_map.resolve(options.layer_map, target, draft, check_weights=options.check_weights)
    found = found.with_dense(options.dense_layers)
    if not found.sources:
        raise layer_map.LayerMapError(
            "every target layer is dense (layer map and dense_layers together), so nothing would be pruned: "
            "use method='dense', or leave some layers out of dense_layers"
        )
    return found


def connect(speculator: SpecAttnSpeculator, target_attn_groups: list) -> Selection:
    """Build capture and store, and hand the target's metadata builders a pruner.

    vLLM calls this a second time after profiling CUDA graphs, with new builders; everything is made anew then.
    """
    vllm_config, options, device = speculator.vllm_config, speculator.options, speculator.device
    if len(speculator.kv_cache_config.kv_cache_groups) != 1:
        raise ValueError(
            "specattn needs draft and target in one KV-cache group, but vLLM made "
            f"{len(speculator.kv_cache_config.kv_cache_groups)}: models with mixed attention types are not supported"
        )
    found = resolve_layer_map(vllm_config, options)
    layers = vllm_config.compilation_config.static_forward_context
    draft_names = {extract_layer_index(name): name for name in speculator.draft_attn_layer_names}
    source_of = {draft_layer: s for s, draft_layer in enumerate(found.sources)}

    store = SelectionStore(len(found.sources), speculator.max_num_reqs, 1, speculator.max_model_len, device)
    capture = DraftCapture(
        options,
        speculator.operations,
        layer_sources={draft_names[i]: s for i, s in source_of.items()},
        num_heads=layers[draft_names[0]].impl.num_heads,
        num_steps=speculator.num_speculative_steps,
        max_num_reqs=speculator.max_num_reqs,
        max_model_len=speculator.max_model_len,
        device=device,
    )
    nbytes = store.nbytes + capture.nbytes
    for group in (group for groups in target_attn_groups for group in groups):
        names = {extract_layer_index(n): n for n in group.layer_names if n not in speculator.draft_attn_layer_names}
        layer_sources = {n: source_of[found.layers[j]] for j, n in names.items() if found.layers[j] is not None}
        if not layer_sources:
            continue
        first = layers[next(iter(layer_sources))]
        for builder in group.metadata_builders:
            assert isinstance(builder, SpecAttnMetadataBuilder)
            builder.pruner = Pruner(
                store,
                speculator.operations,
                speculator.counters,
                layer_sources=layer_sources,
                num_layers=len(names),
                num_kv_heads=first.impl.num_kv_heads,
                block_size=builder.kv_cache_spec.block_size,
                page_strides=lambda layer=first: page_strides(layer.kv_cache),
                max_num_reqs=speculator.max_num_reqs,
                max_model_len=speculator.max_model_len,
                device=device,
            )
            nbytes += builder.pruner.nbytes
    _announce(options, found, speculator.operations.name, nbytes)
    return Selection(found, capture, store)


def _announce(options: SpecAttnOptions, found: LayerMap, executor: str, nbytes: int) -> None:
    pairs = " ".join("-" if i is None else str(i) for i in found.layers)
    logger.warning(
        "specattn: method '%s' is APPROXIMATE: verification reads a selection of the KV cache, so the output is not "
        "the target model's own. For lossless speculation set method='dense'.",
        options.method,
    )
    logger.info(
        "specattn: top_p=%s of the draft's attention, combine=%s, executor=%s, draft layer per target layer [%s] "
        "('-' reads everything), buffers %.1f MiB",
        options.top_p,
        options.combine,
        executor,
        pairs,
        nbytes / 2**20,
    )
    if not found.calibrated:
        logger.warning(
            "specattn: the layer map is uniform, not calibrated for this pair of models: expect worse quality at the "
            "same KV read. Set layer_map to a calibrated map to silence this."
        )

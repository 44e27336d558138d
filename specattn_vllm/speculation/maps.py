"""The mapping of an engine's target layers to draft layers, and to their KV heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from specattn_vllm import layer_map
from specattn_vllm.fingerprint import ModelFacts, facts_from_config
from specattn_vllm.layer_map import LayerMap, LayerMapError
from specattn_vllm.methods.by_draft import ByDraftOptions


def model_facts(model_config: ModelConfig) -> ModelFacts:
    """The facts of a model that vLLM has configured. The digest of its weights is made for local folders only."""
    folder = Path(model_config.model)
    try:
        return facts_from_config(model_config.hf_text_config, folder if folder.is_dir() else None)
    except (TypeError, ValueError) as error:
        raise LayerMapError(
            f"{model_config.model}: a layer map needs a model whose layers all have the same shape ({error})"
        ) from error


def resolve_layer_map(vllm_config: VllmConfig, options: ByDraftOptions) -> LayerMap:
    """The layer map for an engine's pair of models, with the options' dense layers."""
    target = model_facts(vllm_config.model_config)
    draft = model_facts(vllm_config.speculative_config.draft_model_config)
    found = layer_map.resolve(options.layer_map, target, draft, method=options.method).with_dense(options.dense_layers)
    if not found.sources:
        raise LayerMapError(
            "every target layer is dense (layer map and dense_layers together), so nothing would be pruned: "
            "use method='dense', or leave some layers out of dense_layers"
        )
    if options.kind.per_head:
        ranks = vllm_config.parallel_config.tensor_parallel_size
        for rank in range(ranks):
            found.local_heads(rank, ranks)  # raises if the map does not fit
    return found


@dataclass(frozen=True)
class Plan:
    """The draft layers that are captured, and the page table that each target layer reads."""

    sources: tuple[int, ...]
    """Draft layers that are captured. Each makes one selection, or one for each of its KV heads."""
    layer_tables: dict[str, int]
    """vLLM's name of each target layer that reads a selection -> its table."""
    made_from: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    """For methods with one selection per KV head, for each table: the index of its source, and the score group of each
    of this rank's KV heads. None: there is one table for each source."""


def plan_of(found: LayerMap, target: dict[int, str], local_kv_heads: int, options: ByDraftOptions) -> Plan:
    """The plan of a layer map. Target layers with the same source and the same mapping of heads share a table."""
    chosen = {j: found.sources.index(i) for j, i in enumerate(found.layers) if i is not None}
    if not options.kind.per_head:
        return Plan(found.sources, {target[j]: source for j, source in chosen.items()})
    ranks = found.target.num_key_value_heads // local_kv_heads
    heads = found.local_heads(get_tensor_model_parallel_rank() if ranks > 1 else 0, ranks)
    made_from = {j: (source, heads[j]) for j, source in chosen.items()}
    distinct = tuple(dict.fromkeys(made_from.values()))
    return Plan(found.sources, {target[j]: distinct.index(of) for j, of in made_from.items()}, distinct)

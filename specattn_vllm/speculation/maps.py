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
from specattn_vllm.selection.pruner import TableMaps


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
    return found


def check_heads(vllm_config: VllmConfig, options: ByDraftOptions) -> None:
    """Raise LayerMapError if an engine's layer map does not fit, or if its heads do not fit the ranks."""
    found = resolve_layer_map(vllm_config, options)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    for rank in range(ranks):
        found.local_heads(rank, ranks)


@dataclass(frozen=True)
class Plan:
    """The draft layers that are captured, and the page table that each target layer reads."""

    sources: tuple[int, ...]
    """Draft layers that are captured."""
    groups: int
    """Selections that each of them makes: one, or one for each of its KV heads."""
    readers: str
    """Who reads a selection, for the log."""
    layer_tables: dict[str, int]
    """vLLM's name of each target layer that reads a selection -> its table."""
    tables: int
    heads: int
    """Number of page tables, and of the selections in each of them."""
    maps: TableMaps | None = None
    """The selection from which each table is made; None: there is one table for each source."""


def plan_for_layers(found: LayerMap, target: dict[int, str], kv_heads: int, draft_kv_heads: int) -> Plan:
    """The plan of a map by which all heads of a target layer read one selection. target: the names of its layers;
    kv_heads, draft_kv_heads: KV heads of this rank."""
    sources = found.sources
    tables = {target[j]: sources.index(i) for j, i in enumerate(found.layers) if i is not None}
    return Plan(sources, 1, "shared by all heads", tables, len(sources), 1)


def plan_for_heads(found: LayerMap, target: dict[int, str], kv_heads: int, draft_kv_heads: int) -> Plan:
    """As `plan_for_layers`, but each KV head reads a selection of its own. Target layers with the same source and the
    same mapping of heads share a table."""
    ranks = found.target.num_key_value_heads // kv_heads
    heads = found.local_heads(get_tensor_model_parallel_rank() if ranks > 1 else 0, ranks)
    made_from = {target[j]: (found.sources.index(i), heads[j]) for j, i in enumerate(found.layers) if i is not None}
    distinct = list(dict.fromkeys(made_from.values()))
    tables = {name: distinct.index(of) for name, of in made_from.items()}
    maps = TableMaps.of(distinct)
    return Plan(found.sources, draft_kv_heads, "per KV head", tables, len(distinct), kv_heads, maps)

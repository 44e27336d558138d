"""Which draft layer, and which of its heads, each target layer is mapped to in an engine."""

from __future__ import annotations

from pathlib import Path

from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from specattn_vllm import layer_map
from specattn_vllm.fingerprint import ModelFacts, facts_from_config
from specattn_vllm.layer_map import LayerMap, LayerMapError
from specattn_vllm.options import SpecAttnOptions


def model_facts(model_config: ModelConfig) -> ModelFacts:
    """The facts of a model vLLM has configured; the weights' digest only for local folders."""
    folder = Path(model_config.model)
    try:
        return facts_from_config(model_config.hf_text_config, folder if folder.is_dir() else None)
    except (TypeError, ValueError) as error:
        raise LayerMapError(
            f"{model_config.model}: a layer map needs a model whose layers all have the same shape ({error})"
        ) from error


def resolve_layer_map(vllm_config: VllmConfig, options: SpecAttnOptions) -> LayerMap:
    """The layer map for an engine's pair of models, with the options' dense layers."""
    target = model_facts(vllm_config.model_config)
    draft = model_facts(vllm_config.speculative_config.draft_model_config)
    found = layer_map.resolve(
        options.layer_map, target, draft, method=options.method, check_weights=options.check_weights
    ).with_dense(options.dense_layers)
    if not found.sources and not options.is_lossless:
        raise LayerMapError(
            "every target layer is dense (layer map and dense_layers together), so nothing would be pruned: "
            "use method='dense', or leave some layers out of dense_layers"
        )
    if options.per_head:
        ranks = vllm_config.parallel_config.tensor_parallel_size
        for rank in range(ranks):
            found.local_heads(rank, ranks)  # or a refusal
    return found


def tables_of(
    found: LayerMap | None, target: dict[int, str], local_kv_heads: int, options: SpecAttnOptions
) -> tuple[dict[str, int], list[tuple[int, tuple[int, ...]]] | None]:
    """Table of each target layer that reads a selection, and for selections per head from what each table is made:
    its source, and the group of each of this rank's KV heads. Layers that are mapped alike share a table, unless each
    has sizes of its own."""
    if found is None:
        return {}, None
    source_of = {draft_layer: s for s, draft_layer in enumerate(found.sources)}
    mapped = {j: source_of[i] for j, i in enumerate(found.layers) if i is not None}
    if not options.per_head:
        return {target[j]: source for j, source in mapped.items()}, None
    ranks = found.target.num_key_value_heads // local_kv_heads
    heads = found.local_heads(get_tensor_model_parallel_rank() if ranks > 1 else 0, ranks)
    made_from = {j: (source, heads[j]) for j, source in mapped.items()}
    if options.has_sizes:
        return {target[j]: t for t, j in enumerate(made_from)}, [*made_from.values()]
    distinct = list(dict.fromkeys(made_from.values()))
    return {target[j]: distinct.index(of) for j, of in made_from.items()}, distinct

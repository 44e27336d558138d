"""Joins draft and target once both are loaded: the layer map becomes a capture, a store and a pruner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.config import ModelConfig, VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from specattn_vllm import layer_map
from specattn_vllm.fingerprint import ModelFacts, facts_from_config
from specattn_vllm.layer_map import LayerMap, LayerMapError
from specattn_vllm.selection.capture import DraftCapture
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.selection.pruner import Pruner
from specattn_vllm.selection.store import SelectionStore

if TYPE_CHECKING:
    from specattn_vllm.options import SpecAttnOptions
    from specattn_vllm.speculation.speculator import SpecAttnSpeculator

logger = init_logger("vllm.specattn")


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
    found = layer_map.resolve(options.layer_map, target, draft, check_weights=options.check_weights)
    found = found.with_dense(options.dense_layers)
    if not found.sources and not options.is_lossless:
        raise LayerMapError(
            "every target layer is dense (layer map and dense_layers together), so nothing would be pruned: "
            "use method='dense', or leave some layers out of dense_layers"
        )
    return found


@dataclass(frozen=True)
class Selection:
    """The parts that one engine's selections pass through."""

    capture: DraftCapture
    store: SelectionStore
    pruner: Pruner

    @property
    def nbytes(self) -> int:
        return self.capture.nbytes + self.store.nbytes + self.pruner.nbytes

    def attach(self, target_attn_groups: list) -> None:
        """Hand the pruner to the target's metadata builders. vLLM makes new ones after it has profiled CUDA graphs."""
        names = self.pruner.layer_sources
        groups = [g for groups in target_attn_groups for g in groups if any(n in names for n in g.layer_names)]
        if len(groups) != 1:
            raise ValueError(
                f"specattn needs the target's layers in one attention group, but vLLM made {len(groups)}: models with "
                "layers of different shapes are not supported"
            )
        [builder] = groups[0].metadata_builders
        layers = get_layers_from_vllm_config(builder.vllm_config, AttentionLayerBase)
        first = layers[next(iter(names))]
        self.pruner.attach(builder.kv_cache_spec.block_size, lambda: page_strides(first.kv_cache))
        builder.pruner = self.pruner


def prepare(speculator: SpecAttnSpeculator) -> Selection:
    """Everything a selection needs, its buffers included.

    Called as soon as both models are loaded: vLLM measures what is left for the KV cache after that.
    """
    vllm_config, options = speculator.vllm_config, speculator.options
    found = resolve_layer_map(vllm_config, options)
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    draft = {extract_layer_index(n): n for n in layers if n in speculator.draft_attn_layer_names}
    target = {extract_layer_index(n): n for n in layers if n not in speculator.draft_attn_layer_names}
    source_of = {draft_layer: s for s, draft_layer in enumerate(found.sources)}

    def allocate(device: torch.device) -> Selection:
        store = SelectionStore(len(found.sources), speculator.max_num_reqs, 1, speculator.max_model_len, device)
        capture = DraftCapture(
            options,
            speculator.operations,
            layer_sources={draft[i]: s for i, s in source_of.items()},
            num_heads=layers[draft[0]].impl.num_heads,
            num_steps=speculator.num_speculative_steps,
            max_num_reqs=speculator.max_num_reqs,
            max_model_len=speculator.max_model_len,
            device=device,
        )
        pruner = Pruner(
            store,
            speculator.operations,
            speculator.counters,
            layer_sources={target[j]: source_of[i] for j, i in enumerate(found.layers) if i is not None},
            num_layers=len(target),
            num_kv_heads=layers[target[0]].impl.num_kv_heads,
            max_query_len=speculator.num_speculative_steps + 1,
            max_num_reqs=speculator.max_num_reqs,
            max_model_len=speculator.max_model_len,
            device=device,
        )
        return Selection(capture, store, pruner)

    # Sizes first, without memory: an allocation that fails names no option.
    _refuse_if_too_large(allocate(torch.device("meta")).nbytes, speculator)
    selection = allocate(speculator.device)
    _announce(options, found, speculator.operations.name, selection.nbytes)
    return selection


def _refuse_if_too_large(nbytes: int, speculator: SpecAttnSpeculator) -> None:
    if speculator.device.type != "cuda":
        return  # pages of a CPU's memory are taken when they are written
    free, _ = torch.cuda.mem_get_info(speculator.device)
    if nbytes > free // 2:
        raise ValueError(
            f"specattn needs {nbytes / 2**30:.1f} GiB for scores and page tables of max_num_seqs = "
            f"{speculator.max_num_reqs} requests of max_model_len = {speculator.max_model_len} tokens, more than half "
            f"of the {free / 2**30:.1f} GiB that the weights leave: lower --max-num-seqs or --max-model-len"
        )


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

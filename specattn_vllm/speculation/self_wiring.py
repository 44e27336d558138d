"""The parts with which a target drafts for itself: a capture of its verifications, and page tables for drafting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from specattn_vllm.selection.capture import dtype_of_scores
from specattn_vllm.selection.choose import Limits
from specattn_vllm.selection.draft_tables import DraftTables
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.selection.target_capture import TargetCapture
from specattn_vllm.selection.window import Window
from specattn_vllm.speculation.announce import announce_buffers
from specattn_vllm.speculation.wiring import allocated, cache_of, row_width, target_builder

if TYPE_CHECKING:
    from specattn_vllm.speculation.rounds import RoundSpeculator

logger = init_logger("vllm.specattn")


@dataclass(frozen=True)
class SelfSelection:
    """The source of the selections for drafting, and the page tables that are made from them."""

    source: TargetCapture | Window
    tables: DraftTables
    num_kv_heads: int
    reads: str
    """What draft steps read, for the log."""
    capture: TargetCapture | None = None
    """The source, if it captures the target's steps."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each kind of buffer. With a `TargetCapture`, the tables share the memory of its mass."""
        return self.source.nbytes | {"page tables": self.tables.nbytes}

    def attach(self, target_attn_groups: list) -> None:
        """Give the capture to the target's metadata builder. vLLM makes new builders after it profiles CUDA graphs."""
        names = self.tables.layer_sources
        builder = target_builder(target_attn_groups, names)
        cache = cache_of(builder, next(iter(names)))
        self.tables.attach(builder.kv_cache_spec.block_size, lambda: page_strides(cache()))
        builder.target_capture = self.capture


def from_attention(speculator: RoundSpeculator, layers: dict[str, Any], device: torch.device) -> SelfSelection:
    """Select what the target's last verification attended to, in each layer. layers: keyed by vLLM's names."""
    options, impl = speculator.options, next(iter(layers.values())).impl
    sources = {name: s for s, name in enumerate(layers)}
    capture = TargetCapture(
        speculator.operations,
        Limits.of(options),
        layer_sources=sources,
        num_heads=impl.num_heads,
        max_query_len=speculator.num_speculative_steps + 1,
        max_num_reqs=speculator.max_num_reqs,
        max_model_len=row_width(speculator.max_model_len),
        dilation=options.dilation_of(speculator.num_speculative_steps),
        device=device,
        score_dtype=dtype_of_scores(speculator.device),
    )
    # The tables may overwrite the mass: when they are made, the selection from it is finished.
    memory = capture.mass.view(torch.int32).view(len(sources), speculator.max_num_reqs, 1, -1)
    tables = DraftTables(speculator.operations, sources, memory, nbytes=0)
    reads = f"{options.amount_of('its attention')}, dilation {capture.dilation}"
    return SelfSelection(capture, tables, impl.num_kv_heads, reads, capture)


def from_window(speculator: RoundSpeculator, layers: dict[str, Any], device: torch.device) -> SelfSelection:
    """Select the first and the last tokens, for all layers alike."""
    options, impl = speculator.options, next(iter(layers.values())).impl
    requests, width = speculator.max_num_reqs, row_width(speculator.max_model_len)
    window = Window(speculator.operations, Limits.of(options), requests, width, device)
    memory = torch.empty((1, requests, 1, width), dtype=torch.int32, device=device)
    tables = DraftTables(speculator.operations, dict.fromkeys(layers, 0), memory, nbytes=memory.nbytes)
    return SelfSelection(window, tables, impl.num_kv_heads, options.amount_of("its attention"))


def prepare_self(speculator: RoundSpeculator, make: Callable[..., SelfSelection]) -> SelfSelection:
    """Make all parts for self-speculation, with their buffers, by `from_attention` or `from_window`. Called when the
    target is loaded, before vLLM measures the memory left for the KV cache."""
    layers = get_layers_from_vllm_config(speculator.vllm_config, AttentionLayerBase)
    selection = allocated(lambda device: make(speculator, layers, device), speculator)
    announce_buffers(speculator, selection.nbytes)
    logger.info(
        "specattn: method '%s': the target drafts for itself, %d tokens per round, reading %s; its verification is "
        "dense, so the output is the target model's own",
        speculator.options.method,
        speculator.num_speculative_steps,
        selection.reads,
    )
    return selection

"""The parts with which a target drafts for itself: a capture of its verifications, and page tables for drafting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from specattn_vllm.selection.choose import Limits
from specattn_vllm.selection.draft_tables import DraftTables
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.selection.target_capture import TargetCapture
from specattn_vllm.selection.window import Window
from specattn_vllm.speculation.announce import announce_buffers
from specattn_vllm.speculation.wiring import cache_of, refuse_if_too_large, row_width, target_builder

if TYPE_CHECKING:
    from specattn_vllm.speculation.rounds import RoundSpeculator

logger = init_logger("vllm.specattn")


@dataclass(frozen=True)
class SelfSelection:
    """The source of the selections for drafting, and the page tables that are made from them."""

    source: TargetCapture | Window
    tables: DraftTables
    num_kv_heads: int

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
        if isinstance(self.source, TargetCapture):
            builder.target_capture = self.source


def prepare_self(speculator: RoundSpeculator) -> SelfSelection:
    """Make all parts for self-speculation, with their buffers. Called when the target is loaded, before vLLM measures
    the memory left for the KV cache."""
    options = speculator.options
    layers = get_layers_from_vllm_config(speculator.vllm_config, AttentionLayerBase)
    names, first = list(layers), next(iter(layers.values()))
    heads = first.impl.num_kv_heads
    requests, width = speculator.max_num_reqs, row_width(speculator.max_model_len)

    def allocate(device: torch.device) -> SelfSelection:
        if options.kind.window:
            window = Window(speculator.operations, Limits.of(options), requests, width, device)
            tables = torch.empty((1, requests, 1, width), dtype=torch.int32, device=device)
            return SelfSelection(window, _tables(dict.fromkeys(names, 0), tables, tables.nbytes), heads)
        sources = {name: s for s, name in enumerate(names)}
        capture = TargetCapture(
            speculator.operations,
            Limits.of(options),
            layer_sources=sources,
            num_heads=first.impl.num_heads,
            max_query_len=speculator.num_speculative_steps + 1,
            max_num_reqs=requests,
            max_model_len=width,
            dilation=options.dilation_of(speculator.num_speculative_steps),
            device=device,
        )
        # The tables may overwrite the mass: when they are made, the selection from it is finished.
        tables = capture.mass.view(torch.int32).view(len(names), requests, 1, width)
        return SelfSelection(capture, _tables(sources, tables, 0), heads)

    def _tables(sources: dict[str, int], page_table: torch.Tensor, nbytes: int) -> DraftTables:
        return DraftTables(speculator.operations, sources, page_table, nbytes)

    refuse_if_too_large(allocate(torch.device("meta")).nbytes, speculator)
    selection = allocate(speculator.device)
    budget = f"{options.ratio:.1%} of the context"
    if not options.fixed_budget:
        budget = f"top_p={options.top_p} of its attention"
    if isinstance(selection.source, TargetCapture):
        budget += f", dilation {selection.source.dilation}"
    announce_self(speculator, selection.nbytes, budget)
    return selection


def announce_self(speculator: RoundSpeculator, nbytes: dict[str, int], budget: str) -> None:
    """Log the sizes of the buffers, and the budget of draft steps."""
    announce_buffers(speculator, nbytes)
    logger.info(
        "specattn: method '%s': the target drafts for itself, %d tokens per round, reading %s; its verification is "
        "dense, so the output is the target model's own",
        speculator.options.method,
        speculator.num_speculative_steps,
        budget,
    )

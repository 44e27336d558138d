"""Joins draft model and target when both are loaded: makes a capture, a store and a pruner from the layer map."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from specattn_vllm.compat.names import resolve
from specattn_vllm.selection.capture import DraftCapture, dtype_of_scores
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.selection.pruner import Pruner
from specattn_vllm.selection.store import SelectionStore
from specattn_vllm.speculation.announce import announce, sizes
from specattn_vllm.speculation.maps import Plan, resolve_layer_map

if TYPE_CHECKING:
    from specattn_vllm.speculation.rounds import RoundSpeculator

ROW_MULTIPLE = 128

Buffers = TypeVar("Buffers")
"""A class whose `nbytes` are the bytes of each kind of its buffers."""


def row_width(max_model_len: int) -> int:
    """Elements of a row of scores, mass or pages, rounded up so that each row starts aligned. Unaligned rows are read
    and written one number at a time, which made a round a quarter slower (H200, 16 requests of 32k)."""
    return -(-max_model_len // ROW_MULTIPLE) * ROW_MULTIPLE


def target_builder(target_attn_groups: list, names: Container[str]) -> Any:
    """The one metadata builder of the target's layers."""
    groups = [g for groups in target_attn_groups for g in groups if any(n in names for n in g.layer_names)]
    if len(groups) != 1:
        raise ValueError(
            f"specattn needs the target's layers in one attention group, but vLLM made {len(groups)}: models with "
            "layers of different shapes or kinds are not supported here"
        )
    [builder] = groups[0].metadata_builders
    return builder


def cache_of(builder: Any, layer_name: str) -> Callable[[], torch.Tensor]:
    """A function that returns a layer's KV cache. vLLM allocates it later, and twice if it profiles CUDA graphs."""
    layer = get_layers_from_vllm_config(builder.vllm_config, AttentionLayerBase)[layer_name]
    return lambda: layer.kv_cache


@dataclass(frozen=True)
class Selection:
    """The parts of an engine that make, store and apply its selections."""

    capture: DraftCapture
    store: SelectionStore
    pruner: Pruner
    tables: torch.Tensor
    """[tables, requests, G, width] int32: the page tables of the target's step."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each kind of buffer."""
        capture = self.capture
        return {
            "scores": capture.scores.nbytes,
            "mass": capture.nbytes - capture.scores.nbytes,
            "bitmasks": self.store.nbytes,
            "page tables": self.tables.nbytes + self.pruner.nbytes,
        }

    def attach(self, target_attn_groups: list) -> None:
        """Give the pruner to the target's metadata builder. vLLM makes new builders after it profiles CUDA graphs."""
        names = self.pruner.layer_sources
        builder = target_builder(target_attn_groups, names)
        cache = cache_of(builder, next(iter(names)))
        self.pruner.attach(builder.kv_cache_spec.block_size, lambda: page_strides(cache()))
        builder.pruner = self.pruner


def prepare(speculator: RoundSpeculator) -> Selection:
    """Make all parts of the selection, with their buffers.

    Called when both models are loaded, before vLLM measures the memory left for the KV cache.
    """
    vllm_config, options = speculator.vllm_config, speculator.options
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    draft = {extract_layer_index(n): n for n in layers if n in speculator.draft_attn_layer_names}
    target = {extract_layer_index(n): n for n in layers if n not in speculator.draft_attn_layer_names}
    found = resolve_layer_map(vllm_config, options)
    kv_heads = layers[target[0]].impl.num_kv_heads
    plan: Plan = resolve(options.kind.plan)(found, target, kv_heads, layers[draft[0]].impl.num_kv_heads)
    requests = speculator.max_num_reqs
    longest = row_width(speculator.max_model_len)

    def allocate(device: torch.device) -> Selection:
        tables = torch.empty((plan.tables, requests, plan.heads, longest), dtype=torch.int32, device=device)
        store = SelectionStore(len(plan.sources), requests, plan.groups, longest, device)
        capture = DraftCapture(
            options,
            speculator.operations,
            layer_sources={draft[i]: s for s, i in enumerate(plan.sources)},
            num_heads=layers[draft[0]].impl.num_heads,
            num_steps=speculator.num_speculative_steps,
            max_num_reqs=requests,
            max_model_len=longest,
            device=device,
            score_dtype=dtype_of_scores(speculator.device),
            groups=plan.groups,
        )
        pruner = Pruner(
            store,
            speculator.operations,
            speculator.counters,
            layer_sources=plan.layer_tables,
            num_layers=len(target),
            num_kv_heads=kv_heads,
            max_query_len=speculator.num_speculative_steps + 1,
            page_table=tables,
            maps=plan.maps,
        )
        capture.clock = pruner.clock
        return Selection(capture, store, pruner, tables)

    selection = allocated(allocate, speculator, options.kind.smaller)
    announce(options, found, plan.readers, speculator, selection.nbytes)
    return selection


def allocated(make: Callable[[torch.device], Buffers], runner: Any, remedy: str = "") -> Buffers:
    """make(device of the runner), unless it is too large (`refuse_if_too_large`) or cannot be allocated: ValueError."""
    # First without memory: the error of a failed allocation would not name an option to change.
    nbytes = make(torch.device("meta")).nbytes
    refuse_if_too_large(nbytes, runner, remedy)
    try:
        return make(runner.device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        # Somebody else may have taken what was free, or it lies in pieces.
        raise ValueError(
            f"{_needs(nbytes, runner)}, and the allocation failed: lower --max-num-seqs or --max-model-len{remedy}; or "
            f"free memory that others hold ({str(error).splitlines()[0][:200]})"
        ) from None


def refuse_if_too_large(nbytes: dict[str, int], runner: Any, remedy: str = "") -> None:
    """Raise ValueError if the buffers would take more than half of the free GPU memory. runner: our speculator or
    vLLM's model runner; both have max_num_reqs and max_model_len. remedy: one more, after those that always help."""
    if runner.device.type != "cuda":
        return  # on a CPU, memory is only taken when it is first written
    free, _ = torch.cuda.mem_get_info(runner.device)
    if sum(nbytes.values()) > free // 2:
        raise ValueError(
            f"{_needs(nbytes, runner)}, more than half of the {free / 2**30:.1f} GiB that the weights leave: lower "
            f"--max-num-seqs or --max-model-len{remedy}"
        )


def _needs(nbytes: dict[str, int], runner: Any) -> str:
    return (
        f"specattn needs {sum(nbytes.values()) / 2**30:.1f} GiB ({sizes(nbytes)}) for max_num_seqs = "
        f"{runner.max_num_reqs} requests of max_model_len = {runner.max_model_len} tokens"
    )

"""Blocks of the KV cache that a KV connector has filled: what the plugin keeps beside their keys is made anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from specattn_vllm import compat

AT_ONCE = 8192
"""Tokens whose keys are copied at a time."""


def watch(runner: Any) -> None:
    """Tell the layers of a model runner, the drafter's too, what a connector brings. Some connectors copy keys and
    values alone, and some whole blocks: the codes of all keys that are there are made anew in either case."""
    if runner.vllm_config.kv_transfer_config is None:
        return

    def act(block_ids: Sequence[Sequence[int]], tokens: int) -> None:
        layers = get_layers_from_vllm_config(runner.vllm_config, AttentionLayerBase)
        for group, blocks in zip(runner.kv_cache_config.kv_cache_groups, block_ids, strict=True):
            ours = [layers[name] for name in group.layer_names if compat.is_our_layer(layers[name])]
            if ours:
                found = slots(blocks, group.kv_cache_spec.block_size, tokens, runner.device)
                for part in found.split(AT_ONCE):
                    for layer in ours:
                        layer.impl.note_loaded(layer, part)

    compat.after_loads(runner, act)


def slots(blocks: Sequence[int], block_size: int, tokens: int, device: torch.device) -> torch.Tensor:
    """The slots of a request's first tokens, [tokens] int64 on the device; the host does not wait for it."""
    first = torch.tensor(blocks[: -(-tokens // block_size)], dtype=torch.int64)[:, None] * block_size
    found = (first + torch.arange(block_size)).flatten()[:tokens]
    if device.type == "cuda":
        found = found.pin_memory()
    return found.to(device, non_blocking=True)

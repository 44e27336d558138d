"""Blocks of the KV cache that were filled without running the model: what the plugin keeps beside their keys is made
anew."""

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
    """Tell the layers of a model runner, the drafter's too, what a connector or a copy may have filled. Some bring keys
    and values alone, and some whole blocks: the codes of all keys that a request finds are made anew in either case."""

    def act(block_ids: Sequence[Sequence[int]], tokens: int) -> None:
        layers = get_layers_from_vllm_config(runner.vllm_config, AttentionLayerBase)
        for group, blocks in zip(runner.kv_cache_config.kv_cache_groups, block_ids, strict=True):
            found = [layers[name] for name in group.layer_names]
            ours = [layer for layer in found if compat.is_our_layer(layer) and layer.impl.keeps_beside]
            if ours:
                filled = slots(blocks, group.kv_cache_spec.block_size, tokens, runner.device)
                for part in filled.split(AT_ONCE):
                    for layer in ours:
                        layer.impl.note_filled(layer, part)

    compat.after_filled(runner, act)


def slots(blocks: Sequence[int], block_size: int, tokens: int, device: torch.device) -> torch.Tensor:
    """The slots of a request's first tokens, [tokens] int64 on the device."""
    found = torch.tensor(blocks[: -(-tokens // block_size)], dtype=torch.int64)
    if device.type == "cuda":
        found = found.pin_memory()
    found = found.to(device, non_blocking=True)[:, None] * block_size
    return (found + torch.arange(block_size, device=device)).flatten()[:tokens]

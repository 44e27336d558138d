"""Which layers of a model see all of its context. The others are vLLM's own: there is nothing to choose in a sliding
window, and layers of linear attention or Mamba, in hybrid models, keep a state of fixed size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig

WINDOWED = "sliding_attention"
CHUNKED = "chunked_attention"
ATTENTION = ("full_attention", "attention", "hybrid")
"""What hybrid models call their layers of attention. In a layer called 'hybrid', attention stands beside Mamba."""
STATEFUL = ("linear_attention", "mamba", "conv", "hybrid")
INDEXED = ("indexed_attention", "qwen_sparse_attention")


def layer_types(model: ModelConfig) -> list[str]:
    """The kind of each layer, where a model's configuration names them."""
    return list(getattr(model.hf_text_config, "layer_types", None) or [])


def has_windows(model: ModelConfig) -> bool:
    """Whether some layers have a sliding window. A model with a window that does not say which layers have it has it in
    all of them."""
    kinds = layer_types(model)
    return model.get_sliding_window() is not None and (not kinds or WINDOWED in kinds)


def full_layers(model: ModelConfig, layers: int) -> int:
    """How many of a model's `layers` see all of its context, by its configuration; all, if it says nothing."""
    if model.is_hybrid:
        kinds = _kinds_of_hybrid(model)
        return sum(kind in ATTENTION for kind in kinds) if kinds else layers
    kinds = layer_types(model)
    return len(kinds) - kinds.count(WINDOWED) if has_windows(model) else layers


def stateful_layers(model: ModelConfig) -> int:
    """How many layers of a hybrid model keep a state of fixed size."""
    return sum(kind in STATEFUL for kind in _kinds_of_hybrid(model)) if model.is_hybrid else 0


def _kinds_of_hybrid(model: ModelConfig) -> list[str]:
    return layer_types(model) or list(getattr(model.hf_text_config, "layers_block_type", None) or [])


def has_others(model: ModelConfig) -> bool:
    """Whether a model has both layers that see all of its context, and other layers."""
    return model.is_hybrid or (has_windows(model) and bool(full_layers(model, 1)))


def others(model: ModelConfig) -> str:
    """What its other layers are, for messages."""
    return "linear attention or Mamba" if model.is_hybrid else "sliding windows"


def soft_cap(model: ModelConfig) -> float | None:
    """The soft cap on attention logits, where a model's configuration has one."""
    return getattr(model.hf_text_config, "attn_logit_softcapping", None) or None


def unsupported_attention(model: ModelConfig) -> Iterator[str]:
    """Kinds of attention that the kernels do not compute."""
    config = model.hf_text_config
    if CHUNKED in layer_types(model) or getattr(config, "attention_chunk_size", None) is not None:
        yield "layers with chunked local attention"
    if set(layer_types(model)) & set(INDEXED):
        yield "layers that choose their tokens themselves"
    if getattr(config, "ple_layer_ids", None):
        yield "layers with embeddings of their own (PLE)"

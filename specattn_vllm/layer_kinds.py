"""Which layers of a model see all of its context. Layers with a sliding window are left to vLLM's own backends, because
there is nothing to choose in a window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig

WINDOWED = "sliding_attention"
CHUNKED = "chunked_attention"


def layer_types(model: ModelConfig) -> list[str]:
    """The kind of each layer, where a model's configuration names them."""
    return list(getattr(model.hf_text_config, "layer_types", None) or [])


def has_windows(model: ModelConfig) -> bool:
    """Whether some layers have a sliding window. A model with a window that does not say which layers have it has it in
    all of them."""
    kinds = layer_types(model)
    return model.get_sliding_window() is not None and (not kinds or WINDOWED in kinds)


def full_layers(model: ModelConfig, layers: int) -> int:
    """How many of a model's `layers` see all of its context, by its configuration."""
    if not has_windows(model):
        return layers
    kinds = layer_types(model)
    return len(kinds) - kinds.count(WINDOWED)


def unsupported_attention(model: ModelConfig) -> Iterator[str]:
    """Kinds of attention that the kernels do not compute."""
    config = model.hf_text_config
    if CHUNKED in layer_types(model) or getattr(config, "attention_chunk_size", None) is not None:
        yield "layers with chunked local attention"
    if getattr(config, "attn_logit_softcapping", None):
        yield "soft caps on attention logits"

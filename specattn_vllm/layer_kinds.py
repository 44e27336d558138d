"""Which layers of a model see all of its context. Layers with a sliding window are left to vLLM's own backends, because
there is nothing to choose in a window."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def full_layers(model: ModelConfig, layers: int) -> int:
    """How many of a model's `layers` see all of its context, by its configuration. A model with a window that does not
    say which layers have it has it in all of them."""
    if model.get_sliding_window() is None:
        return layers
    return (getattr(model.hf_text_config, "layer_types", None) or []).count("full_attention")


def is_chunked(model: ModelConfig) -> bool:
    """Whether some layers see only a chunk of the context, as in Llama 4."""
    kinds = getattr(model.hf_text_config, "layer_types", None) or []
    return "chunked_attention" in kinds or getattr(model.hf_text_config, "attention_chunk_size", None) is not None

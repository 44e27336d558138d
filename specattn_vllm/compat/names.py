"""Whether an engine uses our backend, and what a path of ours names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKEND_NAME = "SPECATTN"


def resolve(path: str) -> Any:
    """What a path names. Patches name our other modules by paths: these are not needed before an engine starts."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(path)


def is_ours(vllm_config: VllmConfig) -> bool:
    """Whether an engine is configured to use our backend."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME


def is_our_layer(layer: Any) -> bool:
    """Whether an attention layer of a model uses our backend."""
    backend = getattr(layer, "attn_backend", None)
    return backend is not None and backend.get_name() == BACKEND_NAME


def is_ours_in_part(vllm_config: VllmConfig) -> bool:
    """Whether an engine is configured to use our backend for some kinds of layers only, which is not supported. Layers
    with a sliding window are never ours, so another backend may be named for them."""
    per_kind = dict(vllm_config.attention_config.backend_per_kind or {})
    ours = any(backend is not None and backend.name == BACKEND_NAME for backend in per_kind.values())
    per_kind.pop("sliding_window", None)
    return ours or (bool(per_kind) and is_ours(vllm_config))

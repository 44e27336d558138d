"""Whether an engine uses our backend, and the names by which vLLM finds our classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKEND_NAME = "SPECATTN"
# Import paths instead of classes, as in vLLM: these modules are not needed before an engine starts.
BACKEND_PATH = "specattn_vllm.backend.backend.SpecAttnBackend"
ATTACH_PATH = "specattn_vllm.backend.attach.attach"
CHECK_PATH = "specattn_vllm.checks.check"
METRICS_FOLDER_PATH = "specattn_vllm.metrics.snapshot.make_folder"
METRICS_PATH = "specattn_vllm.metrics.collect.add_to"
WINDOWED = "sliding_window"
"""vLLM's name of this kind of layers (`KVCacheSpecKind`)."""
MARK = "_specattn_patched"


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
    per_kind = dict(getattr(vllm_config.attention_config, "backend_per_kind", None) or {})
    ours = any(backend is not None and backend.name == BACKEND_NAME for backend in per_kind.values())
    per_kind.pop(WINDOWED, None)
    return ours or (bool(per_kind) and is_ours(vllm_config))


def resolve(path: str) -> Any:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(path)

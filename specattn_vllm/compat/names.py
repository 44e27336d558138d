"""Whether an engine uses our backend, and the names by which vLLM finds our classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKEND_NAME = "SPECATTN"
# Import paths instead of classes, as in vLLM: these modules are not needed before an engine starts.
BACKEND_PATH = "specattn_vllm.backend.backend.SpecAttnBackend"
SKETCH_SPECULATOR_PATH = "specattn_vllm.speculation.sketch_speculator.SketchSpeculator"
ATTACH_PATH = "specattn_vllm.backend.attach.attach"
CHECK_PATH = "specattn_vllm.checks.check"
METRICS_FOLDER_PATH = "specattn_vllm.metrics.snapshot.make_folder"
METRICS_PATH = "specattn_vllm.metrics.collect.add_to"
MARK = "_specattn_patched"


def is_ours(vllm_config: VllmConfig) -> bool:
    """Whether an engine is configured to use our backend."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME


def is_ours_in_part(vllm_config: VllmConfig) -> bool:
    """Whether an engine is configured to use our backend for some kinds of layers only, which is not supported."""
    per_kind = getattr(vllm_config.attention_config, "backend_per_kind", None) or {}
    names = {backend.name for backend in per_kind.values() if backend is not None}
    return BACKEND_NAME in names or (bool(names) and is_ours(vllm_config))


def resolve(path: str) -> Any:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(path)

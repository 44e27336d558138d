"""vLLM's entry point into this package (`vllm.general_plugins`)."""

from __future__ import annotations

from specattn_vllm.versions import SUPPORTED, is_supported


def register() -> None:
    """Make the backend known to vLLM; called in every vLLM process, some call it twice.

    Imports no CUDA and no kernel. Raises RuntimeError for a vLLM outside the supported range: vLLM stops then, which is
    better than private hooks that fail later.
    """
    import vllm

    if not is_supported(vllm.__version__):
        raise RuntimeError(
            f"specattn-vllm supports vLLM {SUPPORTED}, found {vllm.__version__}: install a vLLM in that range, or "
            "remove specattn-vllm (or leave 'specattn' out of VLLM_PLUGINS)"
        )
    from specattn_vllm import compat

    compat.apply_all()

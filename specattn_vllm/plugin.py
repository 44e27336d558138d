"""vLLM's entry point into this package (`vllm.general_plugins`)."""

from __future__ import annotations

import os
from pathlib import Path

from specattn_vllm.versions import SUPPORTED, is_supported

CHECKED = "SPECATTN_CHECKED_VLLM"
"""Environment variable: the vLLM version whose private parts were already checked."""


def register() -> None:
    """Register the backend with vLLM. Called in every vLLM process, in some of them twice.

    Imports neither CUDA nor kernels. Raises RuntimeError if vLLM is outside the supported range or lacks a part that
    the plugin needs. vLLM stops then, which is better than private hooks that fail later.
    """
    import vllm

    if not is_supported(vllm.__version__):
        raise RuntimeError(
            f"specattn-vllm supports vLLM {SUPPORTED}, found {vllm.__version__}: install a vLLM in that range, or "
            "remove specattn-vllm (or leave 'specattn' out of VLLM_PLUGINS)"
        )
    from specattn_vllm import compat
    from specattn_vllm.compat import leaned_on

    # Child processes have the same vLLM and inherit the variable, so they skip the check.
    if os.environ.get(CHECKED) != vllm.__version__:
        if problem := leaned_on.remedy(Path(vllm.__file__).parent, vllm.__version__):
            raise RuntimeError(problem)
        os.environ[CHECKED] = vllm.__version__
    compat.apply_all()

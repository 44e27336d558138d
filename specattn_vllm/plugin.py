"""vLLM's entry point into this package (`vllm.general_plugins`)."""

from __future__ import annotations

import os
from pathlib import Path

from specattn_vllm.versions import SUPPORTED, is_supported

CHECKED = "SPECATTN_CHECKED_VLLM"
"""Environment variable: the version whose private parts were looked for already."""


def register() -> None:
    """Make the backend known to vLLM; called in every vLLM process, some call it twice.

    Imports no CUDA and no kernel. Raises RuntimeError for a vLLM outside the supported range, or without something that
    is leaned on: vLLM stops then, which is better than private hooks that fail later.
    """
    import vllm

    if not is_supported(vllm.__version__):
        raise RuntimeError(
            f"specattn-vllm supports vLLM {SUPPORTED}, found {vllm.__version__}: install a vLLM in that range, or "
            "remove specattn-vllm (or leave 'specattn' out of VLLM_PLUGINS)"
        )
    from specattn_vllm import compat
    from specattn_vllm.compat import leaned_on

    # The processes that this one starts have the same vLLM.
    if os.environ.get(CHECKED) != vllm.__version__:
        if problem := leaned_on.remedy(Path(vllm.__file__).parent, vllm.__version__):
            raise RuntimeError(problem)
        os.environ[CHECKED] = vllm.__version__
    compat.apply_all()

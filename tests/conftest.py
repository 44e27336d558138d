"""The environment of the suite: on a machine without a GPU, that of `specattn cpu-env`.

It has to stand before any test imports triton or vLLM, which read it once.
"""

import os
import shutil
import signal
import sys
import zlib

import pytest

from specattn_vllm import cpu_runner

if shutil.which("nvidia-smi") is None:
    os.environ.update(cpu_runner.environment())
    if str(cpu_runner.OVERLAY) not in sys.path:
        # PYTHONPATH is for processes that tests start; this one has begun without it.
        sys.path.insert(0, str(cpu_runner.OVERLAY))

# A shell that starts the suite in the background has it ignore Ctrl-C, and Python then keeps ignoring it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded(request):
    """A test draws the same numbers in each run and in any order: what fails once fails again."""
    import torch  # here, not above: after the environment is set

    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))

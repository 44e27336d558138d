"""The environment of the suite: on a machine without a GPU, that of `specattn cpu-env`.

It has to stand before any test imports triton or vLLM, which read it once.
"""

import os
import shutil
import signal
import subprocess
import sys
import zlib
from hashlib import sha256
from pathlib import Path

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


@pytest.fixture
def made_venv(tmp_path):
    """An environment that the scripts take for finished: this one's Python and `specattn`. SPECATTN_VENV names it."""
    root, venv = Path(__file__).parents[1], tmp_path / "venv"
    mode = "cpu" if subprocess.run(["bash", "-c", "nvidia-smi -L"], capture_output=True).returncode else "gpu"
    (venv / "bin").mkdir(parents=True)
    (venv / "specattn-setup").mkdir()
    names = ("pyproject.toml", "scripts/lib/setup.sh", "scripts/lib/constraints-cpu.txt")
    stamp = f"{sha256(b''.join((root / name).read_bytes() for name in names)).hexdigest()}  -\n"
    for want in ("run", "dev"):
        (venv / "specattn-setup" / want).write_text(stamp)
    (venv / "specattn-setup/made-for").write_text(f"{mode} {root} {venv}\n")
    for name, program in (("python", sys.executable), ("specattn", f"{sys.executable} -P -m specattn_vllm.cli")):
        (venv / "bin" / name).write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        (venv / "bin" / name).chmod(0o755)
    return venv

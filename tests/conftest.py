"""The environment of the suite: on a machine without a GPU, that of `specattn cpu-env`; and servers for tests.

The environment has to stand before any test imports triton or vLLM, which read it once.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Self

import pytest
from hypothesis import HealthCheck, Phase, settings

from specattn_vllm import cpu_runner

if shutil.which("nvidia-smi") is None:
    os.environ.update(cpu_runner.environment())
    if str(cpu_runner.OVERLAY) not in sys.path:
        # PYTHONPATH is for processes that tests start; this one has begun without it.
        sys.path.insert(0, str(cpu_runner.OVERLAY))

# A shell that starts the suite in the background has it ignore Ctrl-C, and Python then keeps ignoring it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in each run, and no clock: other tests run at the same time, and Triton's interpreter is slow.
# Who only asks whether a test fails (scripts/trust/mutations.py) does not wait for the smallest example that does.
at_once = {"phases": (Phase.explicit, Phase.generate)} if "SPECATTN_FIRST_FAILURE" in os.environ else {}
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), **at_once)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `long` runs with SPECATTN_LONG, which `scripts/test --long` sets."""
    if "SPECATTN_LONG" not in os.environ:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="runs with scripts/test --long"))


@pytest.fixture(autouse=True)
def seeded(request):
    """A test draws the same numbers in each run and in any order: what fails once fails again."""
    import torch  # here, not above: after the environment is set

    # Not the whole id: pytest-xdist adds the test's group to it.
    torch.manual_seed(zlib.crc32(f"{request.node.path.name}::{request.node.name}".encode()))


class Server:
    """A process that answers on a port of this machine, which nobody else has. Its output goes into a file."""

    def __init__(
        self,
        log: Path,
        command: Callable[[int], Sequence[str]],
        ready: str = "/health",
        port: int = 0,
        **environment: str,
    ):
        """command: of the port; ready: the path that is answered once the server is up; port: 0 for a free one."""
        with socket.socket() as probe:
            # As servers do: a port whose last connections are still being closed can be had.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            self.port = probe.getsockname()[1]
        self.log, self.ready = log, ready
        environment = {**os.environ, **environment}
        # Tests set them for engines of their own. A server's is another process, with another folder of metrics.
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "SPECATTN_METRICS_DIR"):
            environment.pop(name, None)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command(self.port), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def ask(self, path: str, body: bytes | None = None, seconds: float = 300) -> str:
        """The answer to a GET, or to a POST of JSON."""
        address = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"} if body else {})
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return answer.read().decode()

    def wait_until_ready(self, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.ask(self.ready, seconds=2)
                return
            except OSError:
                time.sleep(0.5)
        state = "did not answer" if self.process.poll() is None else f"stopped with {self.process.returncode}"
        pytest.fail(f"the server {state}:\n{self.text()[-3000:]}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@pytest.fixture(scope="session")
def server_class() -> type[Server]:
    """A fixture, because tests are no package: none can import from here."""
    return Server


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

"""`vllm serve` as a process, and what it says of itself."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from specattn_vllm.causes import of_log
from specattn_vllm.tools.engines import MODULE

VLLM = (*MODULE, "vllm.entrypoints.cli.main")
HOST = "127.0.0.1"
IN_HASTE = 8.0
"""Seconds to end in, less than `tools.engines` gives the worker."""
KV = re.compile(r'^specattn:kv_bytes_(read|present)_total\{[^}]*\bby="(\w+)"[^}]*\} (\S+)$', re.M)


class ServerFailed(Exception):
    """It ended, or was never ready."""


class Server:
    """One server. Its processes are in the group of the process that starts it, which ends them if this one cannot."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = probe.getsockname()[1]
        command = [*VLLM, "serve", *arguments, "--host", HOST, "--port", str(self.port)]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def get(self, path: str, seconds: float = 10.0) -> str:
        # A proxy, which the environment may name, does not know this machine's own ports.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{HOST}:{self.port}{path}", timeout=seconds) as answer:
            return answer.read().decode()

    def wait_until_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            with suppress(urllib.error.URLError, OSError):
                self.get("/health", 2.0)
                return
            time.sleep(0.5)
        raise ServerFailed(
            f"not ready after {seconds:g} s (--ready-check-timeout-sec); {self.cause() or 'see its log'}"
        )

    def check(self) -> None:
        """Raise ServerFailed if it has ended."""
        if (status := self.process.poll()) is not None:
            raise ServerFailed(self.cause() or f"the server ended with exit status {status}")

    def cause(self) -> str | None:
        return of_log(self.log.read_text(errors="replace"))

    @property
    def runner(self) -> str:
        return "V2" if "Using V2 Model Runner" in self.log.read_text(errors="replace") else "V1"

    def kv_bytes(self) -> dict[tuple[str, str], float]:
        """('read' or 'present', who reads) -> bytes of the KV cache since the start; nothing for stock vLLM."""
        found: dict[tuple[str, str], float] = {}
        for what, by, value in KV.findall(self.get("/metrics")):
            found[what, by] = found.get((what, by), 0.0) + float(value)
        return found

    def settled_kv_bytes(self, seconds: float = 2.5) -> dict[tuple[str, str], float]:
        """The same once nothing more is published: totals are up to two seconds late."""
        time.sleep(seconds)
        return self.kv_bytes()

    def stop(self, seconds: float = 60.0) -> None:
        """As Ctrl-C does, by force where it takes longer."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            self.process.kill()
            self.process.wait()

"""`vllm serve` as a process, and what it says of itself; what `vllm bench serve` is asked, and what it found."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from specattn_vllm.bench.serve.jobs import flags
from specattn_vllm.bench.serve.schema import WARM_UP, Round, RoundResult, Traffic
from specattn_vllm.causes import LONGEST, of_log
from specattn_vllm.tools.engines import MODULE

VLLM = (*MODULE, "vllm.entrypoints.cli.main")
HOST = "127.0.0.1"
IN_HASTE = 8.0
"""Seconds to end in, less than `tools.engines` gives the worker."""
METRICS = ("ttft", "tpot", "itl", "e2el")
STATISTICS = ("mean", "median", "p99")
THROUGHPUT = ("request_throughput", "output_throughput", "total_token_throughput", "request_goodput")
KV = re.compile(r'^specattn:kv_bytes_(read|present)_total\{[^}]*\bby="(\w+)"[^}]*\} (\S+)$', re.M)


def started(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        into = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, **into, env=environment)


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
        self.process = started(command, environment, log)

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

    def kv_bytes(self) -> Counter[tuple[str, str]]:
        """('read' or 'present', who reads) -> bytes of the KV cache since the start, of one of ours, once nothing more
        is published: totals are up to two seconds late."""
        time.sleep(2.5)
        found: Counter[tuple[str, str]] = Counter()
        for what, by, value in KV.findall(self.get("/metrics")):
            found[what, by] += float(value)
        return found

    def stop(self, seconds: float = 60.0) -> None:
        """As Ctrl-C does, by force where it takes longer."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            self.process.kill()
            self.process.wait()


def client_command(model: str, port: int, of: Round, traffic: Traffic, folder: Path, result: Path) -> list[str]:
    """Greedy, and each request to its last token, so that all servers have the same to do."""
    arguments = {
        "backend": "openai",
        "host": HOST,
        "port": port,
        "model": model,
        "dataset_name": "custom",
        "dataset_path": folder / of.file,
        "custom_output_len": -1,  # as the file has it
        "num_prompts": of.requests,
        "request_rate": "inf" if of.rate == WARM_UP else of.rate,
        "burstiness": traffic.burstiness,
        "seed": traffic.seed,
        "temperature": 0,
        "percentile_metrics": ",".join(METRICS),
        "metric_percentiles": 99,
        "result_dir": result.parent,
        "result_filename": result.name,
    }
    switches = ("disable_shuffle", "skip_chat_template", "ignore_eos", "disable_tqdm", "save_result", "save_detailed")
    words = flags(arguments | dict.fromkeys(switches, True))
    return [*VLLM, "bench", "serve", *words, *(("--goodput", *traffic.goodput) if traffic.goodput else ())]


def summed_up(found: dict[str, Any], of: Round) -> RoundResult:
    """The figures of a result of `vllm bench serve --save-detailed`."""
    # Of each error its last line, which names it; the others are the client's own code.
    errors = {error.strip().splitlines()[-1].strip()[:LONGEST] for error in found["errors"] if error}
    length = found.get("spec_decode_acceptance_length")
    own = {"rate": of.rate, "requests": of.requests, "errors": sorted(errors), "acceptance_length": length}
    result = RoundResult.model_validate(found | own | {"duration": round(found["duration"], 3)})
    if not result.completed:
        result.reason = f"none of {of.requests} requests completed: {'; '.join(result.errors) or 'see the log'}"
        return result
    names = [*(f"{kind}_{metric}_ms" for metric in METRICS for kind in STATISTICS), *THROUGHPUT]
    result.figures = {name: round(found[name], 4) for name in names if found.get(name) is not None}
    return result


def failed(log: Path, of: Round, status: int) -> RoundResult:
    """Of a client that left no result."""
    reason = of_log(log.read_text(errors="replace")) or f"vllm bench serve ended with exit status {status}"
    return RoundResult(rate=of.rate, requests=of.requests, reason=reason)

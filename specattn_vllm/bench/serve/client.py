"""`vllm bench serve` as a process: its arguments, and what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specattn_vllm.bench.serve.schema import WARM_UP, Round, RoundResult, Traffic
from specattn_vllm.bench.serve.server import HOST, VLLM
from specattn_vllm.causes import LONGEST, of_log

METRICS = ("ttft", "tpot", "itl", "e2el")
STATISTICS = ("mean", "median", "p99")
THROUGHPUT = ("request_throughput", "output_throughput", "total_token_throughput", "request_goodput")


def command(model: str, port: int, of: Round, traffic: Traffic, folder: Path, result: Path) -> list[str]:
    """Greedy, and each request to its last token, so that all servers have the same to do."""
    arguments = {
        "backend": "openai",
        "host": HOST,
        "port": port,
        "model": model,
        "dataset-name": "custom",
        "dataset-path": folder / of.file,
        "custom-output-len": -1,  # as the file has it
        "num-prompts": of.requests,
        "request-rate": "inf" if of.rate == WARM_UP else of.rate,
        "burstiness": traffic.burstiness,
        "seed": traffic.seed,
        "temperature": 0,
        "percentile-metrics": ",".join(METRICS),
        "metric-percentiles": 99,
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    switches = ("disable-shuffle", "skip-chat-template", "ignore-eos", "disable-tqdm", "save-result", "save-detailed")
    return [
        *VLLM,
        "bench",
        "serve",
        *(word for name, value in arguments.items() for word in (f"--{name}", str(value))),
        *(f"--{name}" for name in switches),
        *(("--goodput", *traffic.goodput) if traffic.goodput else ()),
    ]


def read(path: Path, of: Round) -> RoundResult:
    """The figures of a result of `vllm bench serve --save-detailed`."""
    return summed_up(json.loads(path.read_text()), of)


def summed_up(found: dict[str, Any], of: Round) -> RoundResult:
    result = RoundResult(
        rate=of.rate,
        requests=of.requests,
        completed=found["completed"],
        failed=found["failed"],
        # Of each error its last line, which names it; the others are the client's own code.
        errors=sorted({_last(error) for error in found["errors"] if error}),
        duration=round(found["duration"], 3),
        total_input_tokens=found["total_input_tokens"],
        total_output_tokens=found["total_output_tokens"],
        acceptance_length=found.get("spec_decode_acceptance_length"),
    )
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


def _last(error: str) -> str:
    return error.strip().splitlines()[-1].strip()[:LONGEST]

"""Jobs of servers, their results, and the report. Names of figures are those of `vllm bench serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from specattn_vllm.bench.schema import OfEngine
from specattn_vllm.tools.outputs import write_json

WARM_UP = "warm-up"
"""The round before those that are measured."""


class Round(BaseModel):
    """Requests that are sent at one rate."""

    rate: str
    """Requests per second, 'inf' for all at once; WARM_UP."""
    requests: int
    file: str
    """The requests, in the folder of the report's logs."""


class Traffic(BaseModel):
    """What all servers are sent."""

    rounds: list[Round]
    """The warm-up first."""
    output_tokens: int
    burstiness: float
    seed: int
    goodput: list[str]


class ServeJob(OfEngine, BaseModel):
    """One server: how to start it, and what to send it."""

    name: str
    mode: str
    kept: float | None = None
    shape: str | None = None
    """Random weights of this shape; else `models`."""
    models: dict[str, str] = Field(default_factory=dict)
    """Role -> demo, a folder, or a name on the hub."""
    engine_arguments: dict[str, Any]
    """Of `vllm serve`, by the names that Python gives them; '{target}' and '{draft}' stand for the models' folders."""
    environment: dict[str, str]
    on_cpu: bool = False
    stock: bool = False
    """As vLLM comes: on a CPU without what lets it use runner V2."""
    traffic: Traffic
    ready_check_timeout_sec: int


class RoundResult(BaseModel):
    """What came of one round."""

    rate: str
    requests: int
    reason: str | None = None
    """Why there are no figures."""
    completed: int = 0
    failed: int = 0
    errors: list[str] = Field(default_factory=list)
    """Of requests that failed, each once."""
    duration: float | None = None
    """Seconds from the first request to the last answer."""
    total_input_tokens: int | None = None
    total_output_tokens: int | None = None
    figures: dict[str, float] = Field(default_factory=dict)
    """Of the requests that completed: mean_ttft_ms, p99_itl_ms, output_throughput, request_goodput, ..."""
    acceptance_length: float | None = None
    """Mean tokens of a round of speculation."""
    kv_read: dict[str, float] = Field(default_factory=dict)
    """Share of the KV cache's bytes that verification and drafting read, as the plugin counted them; ours only."""


class ServerResult(BaseModel):
    name: str
    status: str
    """'ok', 'failed' or 'interrupted'."""
    reason: str | None = None
    job: ServeJob
    doing: str = "starts"
    command: str = ""
    """Of the server, with the models by name."""
    runner: str | None = None
    """vLLM's model runner, 'V1' or 'V2'."""
    warm_up: RoundResult | None = None
    rounds: list[RoundResult] = Field(default_factory=list)
    start_seconds: float | None = None
    """Until the server was ready."""
    seconds: float = 0.0
    log: str | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)


class ServeReport(BaseModel):
    kind: Literal["specattn-bench-serve"] = "specattn-bench-serve"
    version: int = 1
    provenance: dict[str, Any]
    settings: dict[str, Any]
    """What all servers of the report share, requests included."""
    engines: list[ServerResult]

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json", exclude_none=True))

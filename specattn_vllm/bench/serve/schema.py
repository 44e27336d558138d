"""Jobs of servers, their results, and the report. Names of figures are those of `vllm bench serve`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from specattn_vllm.bench.schema import AnyReport, OfEngine, Result
from specattn_vllm.tools.engines import MODULE

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


class ServeJob(OfEngine):
    """One server, and what to send it."""

    worker = (*MODULE, "specattn_vllm.bench.serve.worker")

    shape: str | None = None
    """Random weights of this shape; else `models`."""
    models: dict[str, str] = Field(default_factory=dict)
    """Role -> demo, a folder, or a name on the hub."""
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

    def told(self) -> str:
        if self.reason:
            return f"{self.rate} requests/s: failed, {self.reason}"
        figures = self.figures
        return (
            f"{self.rate} requests/s: {self.completed} of {self.requests} requests, "
            f"TTFT {figures['median_ttft_ms']:,.0f} ms, TPOT {figures['median_tpot_ms']:,.1f} ms (medians), "
            f"{figures['output_throughput']:,.1f} tokens/s"
        )


class ServerResult(Result):
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

    def told(self) -> str:
        if self.status == "ok":
            return f"ok, {self.seconds:.0f} s with its start"
        return f"{self.status}: {self.reason} (log: {self.log})"

    def news(self, since: ServerResult | None) -> list[str]:
        found = [done.told() for done in self.rounds[len(since.rounds) if since else 0 :]]
        return found if since and since.doing == self.doing else [*found, self.doing]


class ServeReport(AnyReport):
    what, result = "server", ServerResult

    kind: Literal["specattn-bench-serve"] = "specattn-bench-serve"
    engines: list[ServerResult]

"""Jobs, results and the report: what is handed to a worker, what comes back, and the JSON file that keeps both.

Reports of other versions have fields that are not here; they are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from specattn_vllm.bench.grid import Cell
from specattn_vllm.tools.engines import MODULE
from specattn_vllm.tools.outputs import write_json

COMMAND = "specattn bench engines"
KIND = "specattn-bench-engines"

NO_ROOM = "no cell fits in the KV cache"
"""Reason of an engine that ran and had nothing to measure; its cells say how much they need."""
UNFINISHED = "interrupted", "ended before it was done"
"""Status and reason of what has not ended by itself."""


class OfEngine(BaseModel):
    """One engine, or a server of one: how to start it. Nothing in it depends on the machine or on the time."""

    worker: ClassVar[Sequence[str]]
    """The command that runs it."""

    name: str
    """The column in tables, e.g. 'specattn 10%'."""
    mode: str
    kept: float | None = None
    shape: str | None
    engine_arguments: dict[str, Any]
    """Of vllm.LLM or `vllm serve`, by the names that Python gives them; '{target}' and '{draft}' stand for the models'
    folders, which the worker makes."""
    environment: dict[str, str]
    """Variables of the worker's process, on top of the caller's."""
    on_cpu: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Of the plugin; none for stock vLLM."""
        return self.engine_arguments.get("additional_config", {}).get("specattn", {})

    @property
    def drafter(self) -> str | None:
        """'{draft}', '{eagle}', '{target}' where it drafts for itself; None without speculation."""
        return self.engine_arguments.get("speculative_config", {}).get("model")

    @property
    def ours(self) -> bool:
        return bool(self.options)

    def listed(self) -> str:
        return f"environment: {' '.join(f'{name}={value!r}' for name, value in self.environment.items())}"


class Result(BaseModel):
    """What came of a job."""

    name: str
    status: str = UNFINISHED[0]
    """'ok', 'failed' or 'interrupted'."""
    reason: str | None = UNFINISHED[1]
    job: OfEngine
    seconds: float = 0.0
    log: str | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)

    def end(self, status: str, reason: str | None = None) -> None:
        self.status, self.reason = status, reason

    def told(self) -> str:
        """How it ended, in a line."""
        raise NotImplementedError

    def news(self, since: Any) -> list[str]:
        """What is to be said, while it runs, that an earlier state did not have (None: there was none)."""
        return []


class AnyReport(BaseModel):
    """`engines` side by side, which share the `settings`."""

    what: ClassVar[str]
    """What each of them is."""
    result: ClassVar[type[Result]]

    version: int = 1
    provenance: dict[str, Any]
    settings: dict[str, Any]
    engines: list[Any]

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json", exclude_none=True))


class Sample(BaseModel):
    """One timed generation."""

    tokens: int
    seconds: float
    rounds: float
    """Steps of the whole batch."""
    tokens_per_round: float
    """Per request."""

    @property
    def seconds_per_round(self) -> float:
        return self.seconds / self.rounds


class CellResult(BaseModel):
    """One cell of one engine. Speeds are medians over the repeats, ranges their extremes."""

    name: str
    batch: int
    prompt_tokens: int
    """Tokens of each prompt: the cell's context, unless the model has not that many positions."""
    skipped: str | None = None
    """Why there are no numbers, where the engine as such runs."""
    tokens_per_second: float | None = None
    tokens_per_second_range: tuple[float, float] | None = None
    milliseconds_per_round: float | None = None
    milliseconds_per_round_range: tuple[float, float] | None = None
    tokens_per_round: float | None = None
    kv_read: float | None = None
    """Share of the KV entries that verification read, as the plugin counted it; ours only."""
    counts: dict[str, int] = Field(default_factory=dict)
    """What the plugin's counters counted during the repeats; ours only."""
    warmups: int = 0
    steady: bool = True
    """Whether warming up ended because the speed was steady, not because of its limit."""
    samples: list[Sample] = Field(default_factory=list)

    def summarise(self) -> None:
        """Fill in the figures from samples and counts."""
        speeds = [sample.tokens / sample.seconds for sample in self.samples]
        rounds = [1000 * sample.seconds_per_round for sample in self.samples]
        request_rounds = sum(sample.tokens / sample.tokens_per_round for sample in self.samples)
        self.tokens_per_second = round(median(speeds), 2)
        self.tokens_per_second_range = round(min(speeds), 2), round(max(speeds), 2)
        self.milliseconds_per_round = round(median(rounds), 3)
        self.milliseconds_per_round_range = round(min(rounds), 3), round(max(rounds), 3)
        self.tokens_per_round = round(sum(sample.tokens for sample in self.samples) / request_rounds, 3)
        if full := self.counts.get("kv_full"):
            self.kv_read = round(self.counts["kv_read"] / full, 4)


class Job(OfEngine):
    worker = (*MODULE, "specattn_vllm.bench.worker")

    shape: str
    cells: list[CellResult]
    """What to time, without figures."""
    draft_tokens: int
    """Draft tokens a round; 0 without speculation."""
    acceptance_length: float | None = None
    generated_tokens: int
    repeats: int
    max_warmups: int


class EngineResult(Result):
    job: Job
    cells: list[CellResult] = Field(default_factory=list)
    kv_cache_tokens: int | None = None

    def told(self) -> str:
        speeds = [f"{cell.name} {cell.tokens_per_second:,.0f}" for cell in self.cells if cell.tokens_per_second]
        parts = [f"{', '.join(speeds)} tokens/s"] if speeds else []
        if self.status != "ok":
            parts = [f"{self.status}: {self.reason} (log: {self.log})", *(f"until then {part}" for part in parts)]
        return "; ".join([*parts, *(f"{cell.name} {cell.skipped}" for cell in self.cells if cell.skipped)])


class Report(AnyReport):
    what, result = "engine", EngineResult

    kind: Literal["specattn-bench-engines"] = KIND
    engines: list[EngineResult]

    @property
    def cells(self) -> list[Cell]:
        return [Cell.parse(name) for name in self.settings["grid"]]

"""Jobs, results and the report: what is handed to a worker, what comes back, and the JSON file that keeps both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from specattn_vllm.bench.grid import OUR_MODES, Cell
from specattn_vllm.tools.outputs import write_json

Status = Literal["ok", "failed", "timeout", "interrupted"]
NO_ROOM = "no cell fits in the KV cache"
"""Reason of an engine that ran and had nothing to measure; its cells say how much they need."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JobCell(_Model):
    """A cell as an engine runs it."""

    name: str
    batch: int
    prompt_tokens: int
    """Tokens of each prompt: the cell's context, unless the model has not that many positions."""


class Job(_Model):
    """One engine: how to start it, and what to time on it. Nothing in it depends on the machine or on the time."""

    name: str
    """The column in tables, e.g. 'specattn 10%'."""
    mode: str
    kept: float | None = None
    shape: str
    cells: list[JobCell]
    engine_arguments: dict[str, Any]
    """Arguments of vllm.LLM; '{target}' and '{draft}' stand for the models' folders, which the worker makes."""
    environment: dict[str, str | None]
    """Variables of the worker's process, on top of the caller's; None removes one."""
    draft_tokens: int
    """Draft tokens a round; 0 without speculation."""
    acceptance_length: float | None = None
    generated_tokens: int
    repeats: int
    max_warmups: int
    seed: int

    @property
    def ours(self) -> bool:
        return self.mode in OUR_MODES

    @property
    def options(self) -> dict[str, Any]:
        """Of the plugin; none for stock vLLM."""
        return self.engine_arguments.get("additional_config", {}).get("specattn", {})

    @property
    def on_cpu(self) -> bool:
        return self.environment.get("TRITON_INTERPRET") == "1"

    @property
    def key(self) -> str:
        """The same for the same job, so that a later run can tell what is already measured."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Sample(_Model):
    """One timed generation."""

    tokens: int
    seconds: float
    rounds: float
    """Steps of the whole batch."""
    tokens_per_round: float
    """Per request."""


class CellResult(_Model):
    """One cell of one engine. Speeds are medians over the repeats, ranges their extremes."""

    name: str
    batch: int
    prompt_tokens: int
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
    cached: float | None = None
    """Smallest share of a prompt that the measured generations found in the prefix cache."""
    samples: list[Sample] = Field(default_factory=list)


class Phase(_Model):
    """A stretch of an engine's time."""

    name: str
    cell: str | None = None
    seconds: float


class EngineResult(_Model):
    name: str
    status: Status
    reason: str | None = None
    job: Job
    job_key: str
    cells: list[CellResult] = Field(default_factory=list)
    phases: list[Phase] = Field(default_factory=list)
    kv_cache_tokens: int | None = None
    seconds: float = 0.0
    log: str | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)


class Report(_Model):
    kind: Literal["specattn-bench-engines"] = "specattn-bench-engines"
    version: int = 1
    provenance: dict[str, Any]
    settings: dict[str, Any]
    """What all engines of the report share, cells included."""
    engines: list[EngineResult]

    @property
    def cells(self) -> list[Cell]:
        return [Cell.parse(name) for name in self.settings["grid"]]

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json", exclude_none=True))

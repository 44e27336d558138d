"""Jobs, results and the report: what is handed to a worker, what comes back, and the JSON file that keeps both.

Reports of other versions have fields that are not here; they are passed over.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, Field

from specattn_vllm.bench.grid import Cell
from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import write_json

COMMAND = "specattn bench engines"
KIND = "specattn-bench-engines"

NO_ROOM = "no cell fits in the KV cache"
"""Reason of an engine that ran and had nothing to measure; its cells say how much they need."""


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


class OfEngine:
    """What the arguments of an engine, or of a server of one, say."""

    engine_arguments: dict[str, Any]

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


class Job(OfEngine, BaseModel):
    """One engine: how to start it, and what to time on it. Nothing in it depends on the machine or on the time."""

    name: str
    """The column in tables, e.g. 'specattn 10%'."""
    mode: str
    kept: float | None = None
    shape: str
    cells: list[CellResult]
    """Without figures."""
    engine_arguments: dict[str, Any]
    """Arguments of vllm.LLM; '{target}' and '{draft}' stand for the models' folders, which the worker makes."""
    environment: dict[str, str]
    """Variables of the worker's process, on top of the caller's."""
    on_cpu: bool = False
    draft_tokens: int
    """Draft tokens a round; 0 without speculation."""
    acceptance_length: float | None = None
    generated_tokens: int
    repeats: int
    max_warmups: int


class EngineResult(BaseModel):
    name: str
    status: str
    """'ok', 'failed' or 'interrupted'."""
    reason: str | None = None
    job: Job
    cells: list[CellResult] = Field(default_factory=list)
    kv_cache_tokens: int | None = None
    seconds: float = 0.0
    log: str | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)


class Report(BaseModel):
    kind: Literal["specattn-bench-engines"] = KIND
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


def read(path: Path, *kinds: type[BaseModel]) -> Any:
    """The report in a file, of one of these kinds (by default `Report`), refused where it is none of them."""
    kinds = kinds or (Report,)
    try:
        text = path.read_bytes()
        named = json.loads(text).get("kind")
        kind = next((kind for kind in kinds if kind.model_fields["kind"].default == named), kinds[0])
        return kind.model_validate_json(text)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no report of `specattn bench`: {str(error).splitlines()[0]}") from None

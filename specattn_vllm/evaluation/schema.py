"""What is measured and what comes of it: settings, jobs, results and the report, as JSON. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TextIO

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from specattn_vllm.evaluation.peer_options import PeerOptions
from specattn_vllm.options import SpecAttnOptions

DENSE_OPTIONS = {"method": "dense"}


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Setting(StrictModel):
    """One row of the table: the plugin's options under a name, or another's selection in the place of the plugin's."""

    name: str = Field(min_length=1)
    options: dict[str, Any]
    peer: PeerOptions | None = None

    @field_validator("options")
    @classmethod
    def _usable(cls, options: dict[str, Any]) -> dict[str, Any]:
        SpecAttnOptions.parse(options)
        return options

    @model_validator(mode="after")
    def _one_method(self) -> Setting:
        if self.peer is not None and self.options != DENSE_OPTIONS:
            raise ValueError(
                f"a peer ({self.peer.name!r}) reads in the place of the plugin, not beside it: its options are "
                f"{json.dumps(DENSE_OPTIONS)}, got {json.dumps(self.options)}"
            )
        return self

    @property
    def is_reference(self) -> bool:
        """Whether this is what the others are compared with: the target alone, with all of its KV."""
        return self.options == DENSE_OPTIONS and self.peer is None

    @property
    def selects(self) -> bool:
        """Whether the plugin prunes what the target reads."""
        return self.peer is None and not self.lossless

    @property
    def lossless(self) -> bool:
        return self.peer is None and SpecAttnOptions.parse(self.options).is_lossless


class EngineJob(StrictModel):
    """One setting, with everything that its figures depend on: the engine, here, and what is done with it."""

    has_reference: ClassVar[bool]
    """Whether the dense run leaves something on disk that the others are compared with."""

    setting: Setting
    target: str
    draft: str
    models: dict[str, dict[str, Any]]
    """What the two are, wherever they lie."""
    draft_tokens: int
    batch: int
    device: Literal["cuda", "cpu"]
    dtype: str
    engine_options: dict[str, Any] = Field(default_factory=dict)

    @property
    def max_model_len(self) -> int:
        raise NotImplementedError

    def run(self, reference: Path, terminal: TextIO) -> Result:
        """The result, measured in this process; progress is shown on `terminal`."""
        raise NotImplementedError

    def has_all(self, result: Result) -> bool:
        """Whether an earlier result of this job, by its key, has all that is asked for now."""
        del result
        return True

    @property
    def key(self) -> str:
        """Changes with anything that the figures depend on, so that a later run can tell what is measured."""
        told = self.model_dump(mode="json", exclude={"target", "draft", "record_kept"})
        if self.setting.peer is None:
            del told["setting"]["peer"]  # as in reports from before there were any
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def engine_arguments(self) -> dict[str, Any]:
        """Of vllm.LLM."""
        draft = self.target if SpecAttnOptions.parse(self.setting.options).drafts_for_itself else self.draft
        arguments: dict[str, Any] = {
            "model": self.target,
            "attention_backend": "specattn",
            # A batch below the crossover is not pruned; how good pruning is has to be measured below it too.
            "additional_config": {"specattn": {"crossover_tokens": 0} | self.setting.options},
            "speculative_config": {
                "model": draft,
                "method": "draft_model",
                "num_speculative_tokens": self.draft_tokens,
            },
            "dtype": self.dtype,
            "max_num_seqs": self.batch,
            "max_model_len": self.max_model_len,
            # Forcing looks at each step when it is done.
            "async_scheduling": False,
            "distributed_executor_backend": "uni",
            "seed": 0,
        }
        if self.device == "cpu":
            arguments |= {"enforce_eager": True, "max_num_batched_tokens": 2048}
        if self.setting.peer is not None:
            arguments["enforce_eager"] = True  # a peer waits for the device
        return arguments | self.engine_options


class Job(EngineJob):
    """Leads a setting's engine through documents, then generates freely from their beginnings."""

    has_reference: ClassVar[bool] = True

    documents: list[list[int]]
    """Token ids, `text_tokens` of each."""
    context: int
    positions: int
    free_tokens: int
    record_kept: bool = False
    """Whether the result says what was kept of the first document; no figure depends on it."""

    @property
    def verified(self) -> int:
        """Tokens after the first that are verified: whole rounds."""
        return verified_tokens(self.positions, self.draft_tokens)

    @property
    def max_model_len(self) -> int:
        generated = max(1 + self.verified, self.free_tokens + self.draft_tokens)
        return self.context + generated + 2 * (self.draft_tokens + 1)

    def run(self, reference: Path, terminal: TextIO) -> SettingResult:
        from specattn_vllm.evaluation.engine import run

        return run(self, reference, terminal).result

    def has_all(self, result: SettingResult) -> bool:
        return not self.record_kept or not self.setting.selects or result.kept is not None


class Result(StrictModel):
    """What is said of any setting that was measured; subclasses have what was found."""

    name: str
    options: dict[str, Any]
    peer: PeerOptions | None = None
    lossless: bool
    job_key: str
    seconds: float
    provenance: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, job: EngineJob, start: float, **found: Any) -> Self:
        """What was found by a job that began at `start`, by `time.perf_counter`."""
        setting = job.setting
        return cls(
            name=setting.name,
            options=setting.options,
            peer=setting.peer,
            lossless=setting.lossless,
            job_key=job.key,
            seconds=round(time.perf_counter() - start, 1),
            **found,
        )

    @property
    def is_reference(self) -> bool:
        return Setting(name=self.name, options=self.options, peer=self.peer).is_reference


class DocumentResult(StrictModel):
    """Means over the scored positions of one document, in nats where they have a unit."""

    nll: float
    kl: float
    agreement: float
    rounds: int | None = None
    """Of the free run, and the tokens that they gave; None in reports from before they were kept."""
    sampled_tokens: int | None = None


class Estimate(StrictModel):
    """A figure of all documents."""

    value: float
    interval: tuple[float, float] | None = None
    """Its ends at 95%; None with one document, or where the figure is not known of each."""

    def text(self, form: str) -> str:
        """As `form` (of `format`) says; what rounds to zero has no sign."""
        told = format(self.value, form)
        if self.interval is None:
            return told
        low, high = (format(end, form) for end in self.interval)
        return f"{told} ({low} to {high})"

    @property
    def is_sure(self) -> bool:
        """Whether it is not 0, as far as the interval says."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


class Figures(StrictModel):
    """One row of the table, as numbers."""

    kv_read: float
    """Share of the context's KV entries that verification read in the forced run."""
    draft_kv_read: float | None
    """The same of drafting; None in reports from before it was counted."""
    kl: Estimate
    agreement: Estimate
    perplexity_change: Estimate
    """Relative, 0.01 is one per cent more."""
    acceptance_length: Estimate


class Kept(StrictModel):
    """What a setting kept of one document, round by round."""

    document: int
    bucket: int
    """Tokens in a bucket."""
    contexts: list[int]
    """Tokens before the drafts of each round."""
    shares: dict[str, float]
    """Target layer -> share of the context that was kept, mean over rounds."""
    layers: dict[str, list[str]]
    """Target layer -> for each round a line of percentages, one a bucket, of which the last may be shorter."""

    def percentages(self, layer: str) -> list[list[int]]:
        """[rounds][buckets], 0 where a round's context had not come to a bucket yet."""
        rows = [[int(percent) for percent in line.split()] for line in self.layers[layer]]
        return [row + [0] * (max(map(len, rows)) - len(row)) for row in rows]


class SettingResult(Result):
    forced: dict[str, int]
    """What the plugin's counters counted in the forced run, ..."""
    free: dict[str, int]
    """... and in the free one."""
    documents: list[DocumentResult]
    kept: Kept | None = None
    """Where it was asked for, of settings that select."""
    figures: Figures | None = None
    """What the table shows, for those who read the file. The table itself makes them anew of the above."""


class AnyReport(StrictModel):
    """Settings side by side; subclasses say of which kind."""

    command: ClassVar[str]
    """What makes it."""

    version: int = 1
    provenance: dict[str, Any]
    setup: dict[str, Any]
    """What all settings of the report share."""
    results: list[Any]

    @property
    def dense(self) -> Any:
        """The result that the others are compared with; None where it is missing."""
        return next((result for result in self.results if result.is_reference), None)

    def complete(self) -> None:
        """Fill in what follows from all results; called before a report is written."""


class Report(AnyReport):
    command: ClassVar[str] = "specattn eval methods"

    kind: Literal["specattn-eval-methods"] = "specattn-eval-methods"
    results: list[SettingResult]

    def complete(self) -> None:
        from specattn_vllm.evaluation.figures import figures

        for result in self.results:
            result.figures = figures(result, self.dense)


def verified_tokens(positions: int, draft_tokens: int) -> int:
    """Positions rounded up to whole rounds of K + 1."""
    return -(-positions // (draft_tokens + 1)) * (draft_tokens + 1)


def text_tokens(context: int, positions: int, draft_tokens: int) -> int:
    """Tokens a document needs: the prompt, the next one, whole rounds, and the drafts made in the last of them."""
    return context + 1 + verified_tokens(positions, draft_tokens) + draft_tokens

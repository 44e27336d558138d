"""What every evaluation has: settings, jobs, results and a report, as JSON. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TextIO

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from specattn_vllm.evaluation.peer_options import PeerOptions
from specattn_vllm.evaluation.scan import of_sketch
from specattn_vllm.installed import UserError
from specattn_vllm.options import SpecAttnOptions

DENSE_OPTIONS = {"method": "dense"}
OTHER_CHUNK = 1000
"""Tokens of a prompt at a time, where batches are to be others than vLLM's own, which are powers of two."""


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Setting(StrictModel):
    """One row of the table: the plugin's options under a name, or another's selection in the place of the plugin's."""

    name: str = Field(min_length=1)
    options: dict[str, Any]
    peer: PeerOptions | None = None
    other_batches: bool = False
    """Whether this is the dense run once more, with half as many requests at a time and prompts in other chunks. It
    differs by nothing but what rounding makes of other shapes, which no other setting's KL can be told from."""

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
        if self.other_batches and (self.options != DENSE_OPTIONS or self.peer is not None):
            raise ValueError(
                f"'other_batches' is the dense run once more: options are {json.dumps(DENSE_OPTIONS)}, without a peer"
            )
        return self

    @property
    def is_reference(self) -> bool:
        return is_reference(self)

    def scan_share(self, head_size: int) -> float:
        """Bytes read of what is searched, for each byte of the entries searched; 0 where nothing is."""
        if self.peer is not None:
            return self.peer.scan_share(head_size)
        options = SpecAttnOptions.parse(self.options)
        return of_sketch(options.sketch_bits, head_size) if options.kind.keeps_sketch else 0.0

    @property
    def selects(self) -> bool:
        """Whether the plugin prunes what the target reads."""
        return self.peer is None and not self.lossless

    @property
    def lossless(self) -> bool:
        return self.peer is None and SpecAttnOptions.parse(self.options).kind.lossless


def is_reference(setting: Setting | Result) -> bool:
    """Whether this is what the others are compared with: the target alone, with all of its KV. Of results too, whose
    options may be those of an older version."""
    return setting.options == DENSE_OPTIONS and setting.peer is None and not setting.other_batches


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
        # As in reports from before there were any.
        for field, default in (("peer", None), ("other_batches", False)):
            if told["setting"][field] == default:
                del told["setting"][field]
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def engine_arguments(self) -> dict[str, Any]:
        """Of vllm.LLM."""
        options = SpecAttnOptions.parse(self.setting.options)
        # A batch below the crossover is not pruned; how good pruning is has to be measured below it too.
        always = {"crossover_tokens": 0} if "crossover_tokens" in options.usable else {}
        draft = self.target if options.drafts_for_itself else self.draft
        arguments: dict[str, Any] = {
            "model": self.target,
            "attention_backend": "specattn",
            "additional_config": {"specattn": always | self.setting.options},
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
        arguments |= self.engine_options
        if self.setting.other_batches:
            fewer = max(1, self.batch // 2)
            rows = fewer * 2 * (self.draft_tokens + 1)  # a round of each, and what drafting takes in beside
            arguments |= {"max_num_seqs": fewer, "max_num_batched_tokens": max(OTHER_CHUNK, rows)}
        return arguments


class Result(StrictModel):
    """What is said of any setting that was measured; subclasses have what was found."""

    name: str
    options: dict[str, Any]
    """As they were when it was measured: a report may have options that this version has not."""
    peer: PeerOptions | None = None
    other_batches: bool = False
    lossless: bool
    scan_share: float | None = None
    """Bytes read of what is searched, for each byte of the entries searched (`scan.py`); None in reports from before
    it was kept apart."""
    job_key: str
    seconds: float
    provenance: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, job: EngineJob, start: float, head_size: int, **found: Any) -> Self:
        """What was found by a job that began at `start`, by `time.perf_counter`, in a target with keys of that size."""
        setting = job.setting
        return cls(
            name=setting.name,
            options=setting.options,
            peer=setting.peer,
            other_batches=setting.other_batches,
            lossless=setting.lossless,
            scan_share=setting.scan_share(head_size),
            job_key=job.key,
            seconds=round(time.perf_counter() - start, 1),
            **found,
        )

    @property
    def is_reference(self) -> bool:
        return is_reference(self)


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

    @property
    def floor(self) -> Any:
        """The result whose KL is that of rounding; None where it is missing."""
        return next((result for result in self.results if result.other_batches), None)

    def complete(self) -> None:
        """Fill in what follows from all results; called before a report is written."""


def read(path: Path, *kinds: type[AnyReport]) -> AnyReport:
    """The report in a file, refused where it is none of these kinds or has nothing that others are compared with."""
    try:
        given = json.loads(path.read_bytes())
        known = {kind.model_fields["kind"].default: kind for kind in kinds}
        kind = known.get(given.get("kind") if isinstance(given, dict) else None)
        if kind is None:
            raise ValueError(f"its kind is not {' or '.join(map(repr, known))}")
        report = kind.model_validate(given)
        if report.dense is None:
            raise ValueError("no dense run in it")
    except (OSError, ValueError) as error:
        wanted = " or ".join(f"`{kind.command}`" for kind in kinds)
        raise UserError(f"{path} is no report of {wanted}: {str(error).splitlines()[0]}") from None
    return report

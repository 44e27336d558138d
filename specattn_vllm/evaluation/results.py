"""What was found of settings, and the report, as JSON. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from specattn_vllm.evaluation.schema import OfSetting
from specattn_vllm.installed import UserError
from specattn_vllm.tools import outputs

COMMAND = "specattn eval methods"
KIND = "specattn-eval-methods"


class DraftResult(BaseModel):
    """What would be accepted of the drafts along one document, means over its rounds (`scores.Acceptance`)."""

    rounds: int
    tokens: float
    """That a round gives, by sampling, ..."""
    greedy_tokens: float
    """... and greedily."""
    accepted: list[float]
    """For each of K drafts, by sampling, that it is accepted after the text's tokens, ..."""
    agreed: list[float]
    """... and greedily."""


class DocumentResult(BaseModel):
    """Means over the scored positions of one document, in nats where they have a unit."""

    nll: float
    kl: float
    agreement: float
    rounds: int
    """Of the free run, and the tokens that they gave."""
    sampled_tokens: int
    drafts: DraftResult


class SettingResult(OfSetting):
    """Options and baseline as they were when it was measured: a report may have options that this version has not, and
    fields, which are passed over."""

    baseline: dict[str, Any] | None = None
    lossless: bool
    scan_share: float
    """Bytes read of what is searched, for each byte of the entries searched (`scan.py`)."""
    job_key: str
    seconds: float
    provenance: dict[str, Any] = Field(default_factory=dict)
    forced: dict[str, int]
    """What the plugin's counters counted in the forced run, ..."""
    free: dict[str, int]
    """... and in the free one."""
    documents: list[DocumentResult]
    figures: dict[str, Any] | None = None
    """What the table shows, for those who read the file. The table itself makes them anew of the above."""


class Report(BaseModel):
    """Settings side by side."""

    kind: str = KIND
    version: int = 1
    provenance: dict[str, Any]
    setup: dict[str, Any]
    """What all settings of the report share."""
    results: list[SettingResult]

    @property
    def dense(self) -> SettingResult | None:
        """The result that the others are compared with; None where it is missing."""
        return next((result for result in self.results if result.is_reference), None)

    @property
    def floor(self) -> SettingResult | None:
        """The result whose KL is that of rounding; None where it is missing."""
        return next((result for result in self.results if result.other_batches), None)


def read(path: Path) -> Report:
    """The report in a file, refused where it is none or has nothing that others are compared with."""
    report = outputs.read(path, COMMAND, Report)
    if report.dense is None:
        raise UserError(f"{path} is no report of `{COMMAND}`: no dense run in it")
    return report

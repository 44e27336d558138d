"""What was found of settings, and the report, as JSON. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from specattn_vllm.evaluation.peer_options import PeerOptions
from specattn_vllm.evaluation.schema import DENSE_OPTIONS, StrictModel
from specattn_vllm.installed import UserError

COMMAND = "specattn eval methods"
KIND = "specattn-eval-methods"


class DraftResult(StrictModel):
    """What would be accepted of the drafts along one document, means over its rounds (`acceptance.py`)."""

    rounds: int
    tokens: float
    """That a round gives, by sampling, ..."""
    greedy_tokens: float
    """... and greedily."""
    accepted: list[float]
    """For each of K drafts, by sampling, that it is accepted after the text's tokens, ..."""
    agreed: list[float]
    """... and greedily."""


class DocumentResult(StrictModel):
    """Means over the scored positions of one document, in nats where they have a unit."""

    nll: float
    kl: float
    agreement: float
    rounds: int | None = None
    """Of the free run, and the tokens that they gave; None in reports from before they were kept."""
    sampled_tokens: int | None = None
    drafts: DraftResult | None = None
    """None in reports from before it was measured."""


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
        """Whether it is not 0, as far as the interval says: of few documents that is not far (`figures.FEWEST`)."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


class Figures(StrictModel):
    """One row of the table, as numbers."""

    kv_read: float
    """Share of the context's KV entries that verification read in the forced run."""
    bytes_read: float | None = None
    """The same in bytes, with what was searched to find them; None where that is not known."""
    draft_kv_read: float
    """The same of drafting; None in reports from before it was counted."""
    kl: Estimate
    kl_above_rounding: Estimate | None = None
    """KL less that of the dense run in other batches, paired by document; None where that was not measured."""
    agreement: Estimate
    perplexity_change: Estimate
    """Relative, 0.01 is one per cent more."""
    acceptance_length: Estimate
    """Tokens a round of the free run."""
    text_tokens: Estimate | None = None
    """Tokens a round along the text, by sampling, ..."""
    text_greedy_tokens: Estimate | None = None
    """... and greedily; None in reports from before they were measured."""


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


class SettingResult(StrictModel):
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
    forced: dict[str, int]
    """What the plugin's counters counted in the forced run, ..."""
    free: dict[str, int]
    """... and in the free one."""
    documents: list[DocumentResult]
    kept: Kept | None = None
    """Where it was asked for, of settings that select."""
    figures: Figures | None = None
    """What the table shows, for those who read the file. The table itself makes them anew of the above."""

    @property
    def is_reference(self) -> bool:
        """Whether the others are compared with it (`Setting.is_reference`)."""
        return self.options == DENSE_OPTIONS and self.peer is None and not self.other_batches


class Report(StrictModel):
    """Settings side by side."""

    kind: Literal["specattn-eval-methods"] = "specattn-eval-methods"
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
    try:
        given = json.loads(path.read_bytes())
        if not isinstance(given, dict) or given.get("kind") != KIND:
            raise ValueError(f"its kind is not {KIND!r}")
        report = Report.model_validate(given)
        if report.dense is None:
            raise ValueError("no dense run in it")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no report of `{COMMAND}`: {str(error).splitlines()[0]}") from None
    return report

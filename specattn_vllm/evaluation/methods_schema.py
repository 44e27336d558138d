"""What `specattn eval methods` measures along a text, and the report, as JSON. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, TextIO

from specattn_vllm.evaluation.schema import AnyReport, EngineJob, Result, StrictModel


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
        return positions_needed(self.context, self.positions, self.draft_tokens, self.free_tokens)

    def run(self, reference: Path, terminal: TextIO) -> SettingResult:
        from specattn_vllm.evaluation.engine import run

        return run(self, reference, terminal).result

    def has_all(self, result: SettingResult) -> bool:
        return not self.record_kept or not self.setting.selects or result.kept is not None


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


class Report(AnyReport):
    command: ClassVar[str] = "specattn eval methods"

    kind: Literal["specattn-eval-methods"] = "specattn-eval-methods"
    results: list[SettingResult]

    def complete(self) -> None:
        from specattn_vllm.evaluation.figures import rows_of

        for result, found in rows_of(self):
            result.figures = found


def verified_tokens(positions: int, draft_tokens: int) -> int:
    """Positions rounded up to whole rounds of K + 1."""
    return -(-positions // (draft_tokens + 1)) * (draft_tokens + 1)


def positions_needed(context: int, positions: int, draft_tokens: int, free_tokens: int) -> int:
    """Positions that an engine needs: of both runs the longer, and room for drafting beyond it."""
    generated = max(1 + verified_tokens(positions, draft_tokens), free_tokens + draft_tokens)
    return context + generated + 2 * (draft_tokens + 1)


def text_tokens(context: int, positions: int, draft_tokens: int) -> int:
    """Tokens a document needs: the prompt, the next one, whole rounds, and the drafts made in the last of them."""
    return context + 1 + verified_tokens(positions, draft_tokens) + draft_tokens

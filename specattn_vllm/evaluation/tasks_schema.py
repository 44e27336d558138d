"""Prompts with known answers, what is measured with them, and the report, as JSON. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, TextIO

from pydantic import Field

from specattn_vllm.evaluation.schema import AnyReport, EngineJob, Result, StrictModel


class Sample(StrictModel):
    """One prompt and its accepted answers, as token ids."""

    task: str = Field(min_length=1)
    length: int | None = None
    """Tokens of context that were asked for; the prompt itself may have a few less."""
    depth: float | None = None
    """Where in the prompt the answer stands: 0 is its beginning, 1 its end."""
    prompt: list[int] = Field(min_length=1)
    answers: list[list[int]] = Field(min_length=1)

    @property
    def answer_tokens(self) -> int:
        """Of the longest accepted answer."""
        return max(map(len, self.answers))

    def score(self, made: list[int]) -> SampleResult:
        """made: greedy tokens, as many as the longest answer has."""
        best = max(self.answers, key=lambda answer: (made[: len(answer)] == answer, _right(made, answer)))
        return SampleResult(exact=made[: len(best)] == best, right=_right(made, best), tokens=made)


def _right(made: list[int], answer: list[int]) -> float:
    """Share of the answer's tokens that stand in their place."""
    return sum(token == wanted for token, wanted in zip(made, answer, strict=False)) / len(answer)


class SampleResult(StrictModel):
    exact: bool
    """Whether the continuation begins with an accepted answer."""
    right: float
    """Share of the tokens of the nearest accepted answer that stand in their place."""
    tokens: list[int]


class TaskJob(EngineJob):
    """Lets a setting's engine answer prompts."""

    has_reference: ClassVar[bool] = False  # what is compared are answers, and they are in the report

    samples: list[Sample]

    @property
    def max_model_len(self) -> int:
        longest = max(len(sample.prompt) + sample.answer_tokens for sample in self.samples)
        # Rounds of drafting are cut where the context ends: they are to be whole.
        return longest + 2 * (self.draft_tokens + 1)

    def run(self, reference: Path, terminal: TextIO) -> TaskResult:
        from specattn_vllm.evaluation.tasks_engine import run

        return run(self, terminal)


class TaskResult(Result):
    counts: dict[str, int]
    """What the plugin's counters counted while the answers were made."""
    samples: list[SampleResult]
    """In the order of the setup's samples."""


class TaskReport(AnyReport):
    """`samples` of its setup has task, length, depth, tokens and a digest of each."""

    command: ClassVar[str] = "specattn eval tasks"

    kind: Literal["specattn-eval-tasks"] = "specattn-eval-tasks"
    results: list[TaskResult]

"""How many tokens an engine of the benchmark has to hold: of prompts, of answers, and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence

from specattn_vllm.bench.grid import Cell

SETTLING_ROUNDS = 2
"""Rounds after the last request's first token that are not timed: the pipeline of steps fills up."""


def generated_tokens(output_tokens: int, draft_tokens: int) -> int:
    """Tokens that a request generates so that about `output_tokens` of them are timed.

    What is cut off, in rounds of at most K + 1 tokens: at the start those in which the pipeline fills, at the end those
    in which requests finish one by one (`worker.window`).
    """
    return output_tokens + (SETTLING_ROUNDS + 3) * (draft_tokens + 1)


def slack_tokens(draft_tokens: int) -> int:
    """Positions past the last generated token that drafts of the rounds in flight may take."""
    return 2 * (draft_tokens + 1)


def prompt_tokens(cell: Cell, room: int) -> int:
    """The cell's context, or what of it fits within the model's positions beside what is generated."""
    if room < 1:
        raise ValueError("--output-tokens: what is generated does not fit in the model's positions; ask for fewer")
    # Whole blocks: vLLM caches no others.
    return cell.context if cell.context <= room else max(room // 16 * 16, 1)


def graph_tokens(drafter: str | None, runner_v1: bool, batches: Sequence[int], draft_tokens: int) -> list[int]:
    """Sizes of CUDA graphs, in tokens, that the grid's batches need.

    A plain step has a token per request, a verification K + 1. On runner V2 a head drafts in graphs of one token per
    request; a draft model of stock vLLM has no graphs there, and one of ours has its own. On runner V1 a draft model
    runs in graphs of these sizes: K + 2 tokens per request in its first step, and one in the others. What is not a
    multiple of K + 1 is rounded up here: vLLM rounds it too, and then drops what exceeds the largest size given.
    """
    if drafter is None:
        return sorted(set(batches))
    verified = draft_tokens + 1
    wanted = [batch * verified for batch in batches]
    if runner_v1:
        wanted += [tokens for batch in batches for tokens in (batch, batch * (draft_tokens + 2))]
    rounded = {-(-tokens // verified) * verified for tokens in wanted}
    return sorted(rounded | set(batches if drafter == "eagle" else ()))

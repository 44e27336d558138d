"""From the times at which single steps delivered their tokens to a decoding speed.

A generation of a batch has three parts: requests join one after the other, all of them decode, and they finish one
after the other. Only the middle is the speed of that batch, so only the middle is timed (`window`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specattn_vllm.bench.grid import SETTLING_ROUNDS
from specattn_vllm.bench.schema import Sample


@dataclass(frozen=True)
class Step:
    """What one engine step delivered."""

    time: float
    """Seconds, on any clock."""
    tokens: dict[int, int]
    """Request -> its new tokens."""


class NoWindow(ValueError):
    """The batch never decoded as a whole for long enough."""


def window(steps: Sequence[Step], batch: int, generated: int, round_tokens: int) -> Sample:
    """The stretch in which all `batch` requests decode.

    It begins SETTLING_ROUNDS steps after the one in which the last request got its first token, and ends before any
    request is within two rounds (of at most `round_tokens` tokens) of its end, `generated` tokens: from there on the
    scheduler has less to schedule. Time runs between the deliveries of two steps; the tokens of the first do not count.
    """
    steps = [step for step in steps if step.tokens]
    totals = dict.fromkeys(range(batch), 0)
    joined = end = None
    for index, step in enumerate(steps):
        for request, tokens in step.tokens.items():
            totals[request] += tokens
        if max(totals.values()) > generated - 2 * round_tokens:
            break
        if joined is None and min(totals.values()) > 0:
            joined = index
        end = index
    start = None if joined is None else joined + SETTLING_ROUNDS
    if start is None or end is None or end <= start:
        raise NoWindow(
            f"no stretch in which all {batch} requests decode: raise --output-tokens, or the KV cache holds less than "
            "the batch"
        )
    timed = steps[start + 1 : end + 1]
    tokens = sum(sum(step.tokens.values()) for step in timed)
    # A request that a step left out had no round in it.
    request_rounds = sum(len(step.tokens) for step in timed)
    return Sample(
        tokens=tokens,
        seconds=steps[end].time - steps[start].time,
        rounds=request_rounds / batch,
        tokens_per_round=tokens / request_rounds,
    )


def seconds_per_round(sample: Sample) -> float:
    return sample.seconds / sample.rounds


def is_steady(samples: Sequence[Sample], tolerance: float = 0.03) -> bool:
    """Whether the last two agree in the time of a round, within a share of it."""
    if len(samples) < 2:
        return False
    last, before = seconds_per_round(samples[-1]), seconds_per_round(samples[-2])
    return abs(last - before) <= tolerance * before

"""What is asked of each server: lengths of prompts, rates, and what a good request is. Standard library only."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping

from specattn_vllm.bench.grid import context_name, parse_context
from specattn_vllm.tools.arguments import number

GOODPUT = ("ttft", "tpot", "e2el")
"""Figures of a request that `vllm bench serve --goodput` takes."""


def parse_lengths(text: str) -> dict[int, float]:
    """'1k:0.5,8k:0.5' -> {1024: 0.5, 8192: 0.5}; without shares, as many requests of each length."""
    found: dict[int, float] = {}
    parts = [part.strip() for part in text.split(",")]
    shares = {":" in part for part in parts}
    for part in parts:
        name, _, share = part.partition(":")
        tokens = parse_context(name)
        try:
            found_share = float(share) if share else 1 / len(parts)
        except ValueError:
            found_share = 0.0
        if tokens is None or len(shares) > 1 or not 0 < found_share <= 1:
            raise argparse.ArgumentTypeError(
                f"'{text}': write TOKENS:SHARE,... with shares above 0 and up to 1, e.g. 1k:0.5,8k:0.5, or TOKENS,..."
            )
        if tokens in found:
            raise argparse.ArgumentTypeError(f"'{text}' names {name} twice")
        found[tokens] = found_share
    if abs(sum(found.values()) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"'{text}': shares add up to {sum(found.values()):g}, and have to add up to 1")
    return found


def lengths_name(lengths: Mapping[int, float]) -> str:
    return ", ".join(f"{100 * share:.3g}% {context_name(tokens)}" for tokens, share in lengths.items())


def parse_rate(text: str) -> str:
    """A rate as text: reports in JSON have no infinity, and it names a round."""
    rate = number(float, lambda found: found > 0, "a rate is requests per second, above 0, or inf for all at once")(
        text
    )
    return "inf" if math.isinf(rate) else f"{rate:g}"


def parse_goodput(text: str) -> str:
    """'ttft:2000', as vLLM takes it."""
    name, _, limit = text.partition(":")
    told = f"write NAME:MS for what a good request is, e.g. ttft:2000; names are {', '.join(GOODPUT)}"
    return f"{name}:{number(float, lambda found: name in GOODPUT and found > 0, told)(limit):g}"


def mixed(lengths: Mapping[int, float], count: int, draw: random.Random) -> list[int]:
    """The lengths of `count` prompts in the order in which they are sent: of each length its share, at least one (so
    `count` is as many as there are lengths, or more)."""
    counts = dict.fromkeys(lengths, 1)
    for _ in range(count - len(lengths)):
        missing = {tokens: share * count - counts[tokens] for tokens, share in lengths.items()}
        counts[max(missing, key=missing.__getitem__)] += 1
    order = [tokens for tokens, number in counts.items() for _ in range(number)]
    draw.shuffle(order)
    return order

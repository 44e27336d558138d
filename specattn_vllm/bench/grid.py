"""What a benchmark is asked for, as plain values: cells, modes and options. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

STOCK_MODES = ("plain", "draft-v2", "draft-v1", "eagle")
"""'eagle': a head of EAGLE-3's shape, for shapes that have one. Named to be measured."""
SELF_MODES = ("vegas", "streamingllm")
"""The target drafts for itself. Named to be measured: the acceptance of a draft model says nothing about theirs."""
SKETCH_MODES = ("sketch", "sketch-eagle", "sketch-alone")
"""The target chooses for itself: with a draft model, with EAGLE-3's head, without speculation."""
ALONE_MODES = ("plain", "sketch-alone")
"""Without speculation."""
EAGLE_MODES = ("eagle", "sketch-eagle")
KEPT_MODES = ("specattn", *SKETCH_MODES, *SELF_MODES)
"""An engine for each kept share of the context."""
OUR_MODES = ("dense", "sparse-draft", *KEPT_MODES)
MODES = (*STOCK_MODES, *OUR_MODES)
DEFAULT_MODES = tuple(mode for mode in MODES if mode not in (*SELF_MODES, *EAGLE_MODES, "sketch-alone"))
DRAFT_TOKENS = 5
ACCEPTANCE_LENGTH = 3.5
SETTLING_ROUNDS = 2
"""Rounds after the last request's first token that are not timed: the pipeline of steps fills up."""


class Cell(NamedTuple):
    """One place of the grid: so many requests at a time, each with so many tokens of prompt."""

    batch: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        """'16x32k' -> Cell(16, 32768); k is 1024 and M is 1024 squared."""
        batch, sign, context = text.strip().lower().partition("x")
        units = {"k": 1024, "m": 1024 * 1024}
        factor = units.get(context[-1:], 1)
        number = context[:-1] if factor != 1 else context
        if not (sign and batch.isdecimal() and number.isdecimal() and int(batch) and int(number)):
            raise ValueError(f"'{text}' is not a cell: write BATCHxCONTEXT, e.g. 16x32k or 4x2048")
        return cls(int(batch), int(number) * factor)

    def __str__(self) -> str:
        return f"{self.batch}x{context_name(self.context)}"


def context_name(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


def parse_grid(text: str) -> list[Cell]:
    """In the order in which an engine measures them: shorter contexts first, of one context the largest batch first.

    All prompts are beginnings of the same texts, so that smaller batches and longer contexts find what came before them
    in the prefix cache.
    """
    cells = [Cell.parse(part) for part in text.split(",")]
    if len(set(cells)) != len(cells):
        raise ValueError(f"'{text}' names a cell twice")
    return sorted(cells, key=lambda cell: (cell.context, -cell.batch))


def parse_modes(text: str) -> list[str]:
    modes = [part.strip() for part in text.split(",")]
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or len(set(modes)) != len(modes):
        raise ValueError(f"'{text}' is not a list of different modes: choose from {', '.join(MODES)}")
    return modes


def parse_fractions(text: str) -> list[float]:
    fractions = [float(part) for part in text.split(",")]
    if not all(0 < fraction <= 1 for fraction in fractions) or len(set(fractions)) != len(fractions):
        raise ValueError(f"'{text}' is not a list of different fractions between 0 and 1")
    return fractions


def parse_lengths(text: str) -> tuple[float, ...]:
    lengths = tuple(float(part) for part in text.split(","))
    if len(set(lengths)) != len(lengths):
        raise ValueError(f"'{text}' names a length twice")
    return lengths


def parse_sizes(text: str) -> list[int]:
    sizes = sorted({int(part) for part in text.split(",")})
    if sizes[0] < 1:
        raise ValueError(f"'{text}' is not a list of sizes of 1 and more")
    return sizes


T = TypeVar("T", int, float)


def parse_for_mode(parse: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    """A parser of 'VALUE', for all modes, and 'MODE:VALUE', for one mode that speculates or one of its engines:
    'vegas:4' -> ('vegas', 4), 'vegas 5%:4' -> ('vegas 5%', 4), '4' -> ('', 4)."""
    modes = [mode for mode in MODES if mode != "plain"]

    def convert(text: str) -> tuple[str, T]:
        name, sign, value = text.rpartition(":")
        mode, space, share = name.partition(" ")
        known = mode in modes and (not space or (mode in KEPT_MODES and re.fullmatch(r"[\d.]+%", share)))
        if sign and not known:
            raise ValueError(f"'{name}' is no mode that speculates, alone or as in 'vegas 10%': {', '.join(modes)}")
        try:
            return name, parse(value)
        except ValueError:
            raise ValueError(f"'{text}' is not VALUE or MODE:VALUE, e.g. 4 or vegas:4") from None

    return convert


def generated_tokens(output_tokens: int, draft_tokens: int) -> int:
    """Tokens that a request generates so that about `output_tokens` of them are timed.

    What is cut off, in rounds of at most K + 1 tokens: at the start those in which the pipeline fills, at the end those
    in which requests finish one by one (`timing.window`).
    """
    return output_tokens + (SETTLING_ROUNDS + 3) * (draft_tokens + 1)


def prompt_tokens(cell: Cell, generated: int, draft_tokens: int, max_position: int) -> int:
    """The cell's context, or what of it leaves room within the model's positions for what is generated."""
    room = max_position - generated - slack_tokens(draft_tokens)
    if room < 1:
        raise ValueError(f"{generated} generated tokens do not fit in a model of {max_position} positions")
    # Whole blocks: vLLM caches no others.
    return cell.context if cell.context <= room else max(room // 16 * 16, 1)


def slack_tokens(draft_tokens: int) -> int:
    """Positions past the last generated token that drafts of the rounds in flight may take."""
    return 2 * (draft_tokens + 1)

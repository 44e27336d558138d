"""Cells of a grid, as plain values. Standard library only."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from specattn_vllm.tools.arguments import parse_list


class Cell(NamedTuple):
    """One place of the grid: so many requests at a time, each with so many tokens of prompt."""

    batch: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        """'16x32k' -> Cell(16, 32768); k is 1024 and M is 1024 squared."""
        batch, sign, context = text.strip().lower().partition("x")
        tokens = parse_context(context)
        if not (sign and batch.isdecimal() and int(batch) and tokens):
            raise argparse.ArgumentTypeError(f"'{text}' is not a cell: write BATCHxCONTEXT, e.g. 16x32k or 4x2048")
        return cls(int(batch), tokens)

    def __str__(self) -> str:
        return f"{self.batch}x{context_name(self.context)}"


def parse_context(text: str) -> int | None:
    """'32k' -> 32768; None for what is no number of tokens."""
    text = text.strip().lower()
    factor = {"k": 1024, "m": 1024 * 1024}.get(text[-1:], 1)
    number = text[:-1] if factor != 1 else text
    return int(number) * factor or None if number.isdecimal() else None


def context_name(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


def parse_grid(text: str) -> list[Cell]:
    """In the order in which an engine measures them: shorter contexts first, of one context the largest batch first.

    All prompts are beginnings of the same texts, so that smaller batches and longer contexts find what came before them
    in the prefix cache.
    """
    return sorted(parse_list(Cell.parse)(text), key=lambda cell: (cell.context, -cell.batch))

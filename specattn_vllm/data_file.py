"""JSON files that users give: read within a limit, and refused where JSON leaves open what is meant. Standard library
only."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

LONGEST = 300
"""Characters of a message about somebody's data. A file with thousands of errors must not fill a log."""


def read(path: Path, largest: int) -> bytes:
    """A regular file's content. OSError for other kinds, which may never end, and for more than `largest` bytes."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # a zero byte in the name
        raise OSError(None, str(error)) from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(None, "no regular file")
    with os.fdopen(file, "rb") as opened:
        data = opened.read(largest + 1)
    if data is None:  # of a special file that has nothing to say yet
        raise OSError(None, "no regular file")
    if len(data) > largest:
        raise OSError(None, f"it has more than {largest:,} bytes")
    return data


def parse(data: bytes) -> Any:
    """JSON as its standard has it. ValueError for the same key twice, of which readers take either, for NaN and
    infinity, and for what is nested too deep."""
    try:
        return json.loads(data, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {plain(repr(twice))} is there twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def plain(text: str, longest: int = LONGEST) -> str:
    """Text of somebody's data, for a message: short, and without what a terminal would obey."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: longest + 1])
    return shown if len(text) <= longest else f"{shown[:longest]}... ({len(text):,} characters)"

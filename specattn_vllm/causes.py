"""The message of an exception, or of the log of what it ended, in one line for a terminal, the original cause first."""

from __future__ import annotations

import itertools
import re

from pydantic import ValidationError

from specattn_vllm import data_file
from specattn_vllm.installed import UserError

LONGEST = 600


def summary(error: BaseException) -> str:
    """The original cause of a chain of `raise ... from ...`, followed by the last exception.

    If a message begins with a heading ("cannot serve this:") and gives its reasons on separate lines, the reasons come
    first.
    """
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    text = _one(chain[-1])
    if len(chain) > 1:
        text += f" (which led to {_one(error)})"
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


def of_file(error: Exception) -> str:
    """What is wrong with somebody's file, in one line; its name stands beside it already."""
    if isinstance(error, ValidationError):
        first, *others = (data_file.plain(_problem(found)) for found in error.errors())
        return f"{first}; and {len(others)} more" if others else first
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def of_log(log: str) -> str | None:
    """The first error that a log names: what follows it, "engine core initialization failed", tells less."""
    # In front of a line may stand which process and which of its lines of code it is from.
    lines = [re.sub(r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?", "", line) for line in log.splitlines()]
    for index, line in enumerate(lines):
        if re.match(r"[\w.]*(?:Error|Exception): .", line):
            # pydantic's own first line says how many errors there are, the two after it which one and where.
            if "ValidationError: " in line:
                return " ".join(part.strip() for part in lines[index + 1 : index + 3])[:300]
            # A heading has its reasons in indented lines below it.
            below = itertools.takewhile(lambda part: part.startswith("  "), lines[index + 1 :])
            name, message = line.split(": ", 1)
            return of_lines(name.rpartition(".")[2], [message, *(below if line.endswith(":") else ())])[:LONGEST]
    return None


def _one(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, UserError):
        return " ".join(str(error).split())  # it is written for users, who do not know the class
    if isinstance(error, ValidationError):
        return "; ".join(_problem(found) for found in error.errors())
    return of_lines(name, str(error).splitlines()) if str(error).strip() else name


def of_lines(name: str, lines: list[str]) -> str:
    """One line from the lines of a message and the name of its exception."""
    lines = [line for line in lines if line.strip()]
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        reasons = "; ".join(line.strip() for line in lines[1:])
        return f"{reasons} ({name}: {lines[0].strip().rstrip(':')})"
    return f"{name}: {lines[0].strip()}"


def _problem(found: dict) -> str:
    """One of pydantic's errors, without the link to its manual."""
    place = ".".join(str(part) for part in found["loc"])
    message = " ".join(found["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").split())
    return f"{place}: {message}" if place else message

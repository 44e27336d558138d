"""The message of an exception in one line for a terminal, with the original cause first."""

from __future__ import annotations

from pydantic import ValidationError

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


def _one(error: BaseException) -> str:
    name = type(error).__name__
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

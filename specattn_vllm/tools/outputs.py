"""Files that commands write, refused before anything is measured where they could not be, and read again; and tables.
Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from specattn_vllm import data_file
from specattn_vllm.installed import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

Report = TypeVar("Report", bound="BaseModel")
LARGEST = 256 * 2**20
"""Bytes of a report."""


def output_file(text: str) -> Path:
    """For argparse's `type`. Folders are not made: a slip in a path would leave them anywhere, and the figures with
    them."""
    path = Path(text).expanduser()
    folder = path.parent
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give a file in it, e.g. {path / 'results.json'}")
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        remedy = "give another" if folder.exists() else f"make it (mkdir -p {folder}), or give another"
        raise argparse.ArgumentTypeError(f"{text}: {folder}: {what}: {remedy}")
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: {folder} may not be written to: give another")
    return path


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file at once: whoever reads, at any time or after a crash, finds the old one or the whole new one.

    Raises UserError if it cannot be written; nothing is left behind then. A device or a pipe, as /dev/stdout may be, is
    written to as it is: a file must not take its place.
    """
    data = data.encode() if isinstance(data, str) else data
    given, path = path, path.resolve()  # a link stays a link
    partial = path.with_name(path.name + ".part")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        # It was there at the start (`output_file`); should it be gone, hours of figures are worth making it again.
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{given} cannot be written: {error.strerror}") from None


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read(path: Path, told: str, *kinds: type[Report]) -> Report:
    """The report in a file, of one of these kinds, by the `kind` that it names; `told` says what writes them."""
    try:
        given = data_file.parse(data_file.read(path, LARGEST))
        named = given.get("kind") if isinstance(given, dict) else None
        by_name = {kind.model_fields["kind"].default: kind for kind in kinds}
        if named not in by_name:
            raise ValueError(f"its kind is not {' or '.join(map(repr, by_name))}")
        return by_name[named].model_validate(given)
    except (OSError, ValueError) as error:
        from specattn_vllm.causes import of_file

        raise UserError(f"{path} is no report of `{told}`: {of_file(error)}") from None


@contextmanager
def shown(path: Path) -> Iterator[None]:
    """Within it a report is shown, whose settings may lack something: UserError then."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        missing = data_file.plain(f"{type(error).__name__}: {error}")
        raise UserError(f"{path} cannot be shown: it lacks what such reports have ({missing})") from None


def earlier(path: Path, told: str, kind: type[Report], shared: str, now: Mapping[str, Any]) -> Report | None:
    """The report in a file that is to be gone on with; None without one. UserError where its field `shared`, about all
    of it, is not as asked for `now`: figures that cannot be compared would stand in one table."""
    if not path.exists():
        return None
    try:
        found = kind.model_validate_json(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is no report of `{told}`: give another --out, or --overwrite") from None
    before, now = getattr(found, shared), json.loads(json.dumps(now))
    if differing := [key for key in now if before.get(key) != now[key]]:
        raise UserError(
            f"{path} was measured with another {', '.join(differing)}: give another --out, or --overwrite to start anew"
        )
    return found


def document(headings: Sequence[str], rows: Iterable[Iterable[str]], *below: str) -> str:
    """A table as Markdown, as documents hold it, and paragraphs below it."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
    return "\n\n".join(["\n".join(lines), *below]) + "\n"


def fitted(text: str) -> str:
    """What `document` made, as this terminal shows it: a table wider than it has a line for each cell. Elsewhere, as in
    a file or a pipe, it stays Markdown."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n\n".join(_fit(block, width) for block in text.rstrip("\n").split("\n\n")) + "\n"


def _fit(block: str, width: int) -> str:
    lines = block.splitlines()
    if not block.startswith("| "):
        return "\n".join(textwrap.fill(line, width) for line in lines)
    if max(map(len, lines)) <= width:
        return block
    headings, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    longest, stacked = max(map(len, headings[1:])), [headings[0]]
    for title, *cells in rows:
        stacked += ["", title]
        stacked += [f"  {heading:{longest}}  {cell}" for heading, cell in zip(headings[1:], cells, strict=True)]
    return "\n".join(stacked)

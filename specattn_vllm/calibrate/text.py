"""Makes windows of token ids from text files, and reads only as much text as needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from specattn_vllm.evaluation.texts import held_out
from specattn_vllm.installed import DEMO, UserError

DEMO_TEXT = DEMO / "calibration.txt"
"""Source code of an earlier state of this package. It is shipped, so that all calibrations of the demo pair use the
same text."""
PART = 1 << 16
"""Characters that are tokenized at once."""


class Windows(NamedTuple):
    ids: torch.Tensor
    """[windows, tokens] int64."""
    files: list[dict[str, str]]
    """Name and SHA-256 of each file that was read."""

    @property
    def digest(self) -> str:
        """SHA-256 over the ids, as little-endian int32."""
        return hashlib.sha256(self.ids.numpy().astype("<i4").tobytes()).hexdigest()


def parts(path: Path) -> Iterator[str]:
    """The text of a file in parts. A part ends at the end of a line, unless the line is longer than PART."""
    try:
        with path.open(encoding="utf-8") as file:
            while part := file.read(PART) + file.readline(PART):
                yield part
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {path} is not text in UTF-8") from None


def file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror}") from None


def refuse_held_out(digests: dict[Path, str]) -> None:
    """Refuse text on which `specattn eval methods` evaluates, because its results would favour the map."""
    evaluated = {hashlib.sha256(text.encode()).hexdigest(): name for name, text in held_out()}
    for path, digest in digests.items():
        if digest in evaluated:
            raise UserError(
                f"--text {path} is the standard library's {evaluated[digest]}, which `specattn eval methods` evaluates "
                "on: give other text"
            )


def windows(
    paths: list[Path], tokenize: Callable[[str], list[int]], first: Iterable[int], size: int, most: int
) -> Windows:
    """Up to `most` windows of `size` tokens, cut one after the other from the files in their order. Each window begins
    with the tokens `first`, for example BOS if the models use one. Files that are shorter than a window are joined.

    tokenize: must add no special tokens. Raises UserError if the text is not enough for one window.
    """
    digests = {path: file_digest(path) for path in paths}
    refuse_held_out(digests)
    first = list(first)
    found, pending, read = [], [], []
    for path in paths:
        read.append({"name": path.name, "sha256": digests[path]})
        for part in parts(path):
            pending += tokenize(part)
            while len(pending) >= size - len(first):
                found.append(first + pending[: size - len(first)])
                del pending[: size - len(first)]
                if len(found) == most:
                    return Windows(torch.tensor(found), read)
    if not found:
        raise UserError(
            f"--text: {len(pending):,} tokens in all, and one window takes {size:,} (--window): give more text"
        )
    return Windows(torch.tensor(found), read)

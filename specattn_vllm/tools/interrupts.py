"""An end by Ctrl-C or by SIGTERM, as `timeout` and schedulers send it, of a command that takes long.

Both end in the same way: engines end too, what was measured is written, and the exit status says by which signal, as a
shell does (130 and 143).
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

ANEW = ("--overwrite", "--resume")
"""Arguments that say what becomes of an earlier report."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, in the place of Ctrl-C."""


@contextmanager
def ended_as_interrupted() -> Iterator[None]:
    """Within it SIGTERM raises what Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(interrupt: KeyboardInterrupt) -> int:
    """The exit status after it."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def resumed(*more: str, argv: Sequence[str] | None = None) -> str:
    """The command that goes on from here: this one, with `more`, and without what would throw the report away."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ANEW]
    return shlex.join(["specattn", *words, *more])

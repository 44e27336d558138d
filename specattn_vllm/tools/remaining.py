"""How far a run of several parts is, and about how long the rest takes."""

from __future__ import annotations

import time


class Remaining:
    """Counts the parts of a run: "setting 3 of 31"."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.begun = self.ended = 0
        self._start = time.monotonic()

    def begin(self) -> str:
        """Which part begins."""
        self.begun += 1
        return f"{self.what} {self.begun} of {self.total}"

    def end(self) -> str:
        """What is left once a part has ended, as if the others took as long as those so far; '' after the last."""
        self.ended += 1
        left = self.total - self.ended
        if left <= 0:
            return ""
        # Parts that run at a time share the time that has passed.
        seconds = (time.monotonic() - self._start) / self.ended * left
        return f"{self.ended} of {self.total} done, about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3 h 5 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

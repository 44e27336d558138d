"""Logs a line per interval, and publishes totals as metrics. Nothing here waits for the device."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from specattn_vllm.stats import Counters, Counts, Reading

if TYPE_CHECKING:
    import torch

# A child of vLLM's logger, so that its handler and its level apply.
logger = logging.getLogger("vllm.specattn")

PUBLISH_S = 1.0
"""Minimum number of seconds between two publications."""
RETRY_S = 0.1


class Reporter:
    """Logs one line for each interval in which anything was verified, and publishes totals while requests run.

    Called once per step, and when no request is left. One step begins to copy the totals to the host, and a later step
    uses the finished copy. If no step follows, because the engine is idle, a timer does.
    """

    def __init__(self, counters: Counters, interval_s: float, logs: bool = True) -> None:
        self.counters = counters
        self.interval_s = interval_s
        self.logs = logs
        self.more: list[Callable[[Sequence[torch.Tensor]], str | None]] = []
        """Functions that return a further log line, or None, from the tensors of `extra` on the host. Called whenever a
        line is due."""
        self.publish: Callable[[Counts, list[torch.Tensor]], None] | None = None
        """Called with the totals, and the tensors of `extra` on the host. Set when the first request arrives."""
        self.extra: Callable[[], Sequence[torch.Tensor]] = tuple
        """Returns further tensors on the device, which are copied together with the totals."""
        self.fold: Callable[[], None] = lambda: None
        """Counts the last step, for engines that otherwise count it only when the next step begins."""
        self._since = self._published = time.monotonic()
        self._last = Counts()
        self._reading: Reading | None = None
        self._begun = self._since
        self._trailing: Reading | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Begin anew, because the counters do. Drops readings of earlier totals."""
        with self._lock:
            self._reading = self._trailing = None
            self._last, self._since = Counts(), time.monotonic()

    def tick(self) -> None:
        """Called once per step."""
        now = time.monotonic()
        with self._lock:
            self._trailing = None
            if self._reading is None:
                line = self.logs and now - self._since >= self.interval_s
                if not line and (self.publish is None or now - self._published < PUBLISH_S):
                    return
                self._reading, self._begun = self._read(), now
            if not self._reading.ready():
                return
            reading, self._reading = self._reading, None
            counts = reading.counts()
            if self.publish is not None:
                self._hand_on(reading, counts)
        if self.logs and self._begun - self._since >= self.interval_s:
            self._log(counts, reading.extra(), self._begun)

    def idle(self) -> None:
        """Called when no request is left. Publishes the final totals when PUBLISH_S has passed."""
        if self.publish is None:
            return
        self.fold()
        with self._lock:
            self._reading, self._trailing = None, self._read()
            if self._timer is None:
                self._start_timer(self._published + PUBLISH_S - time.monotonic())

    def _read(self) -> Reading:
        return self.counters.begin_read(self.extra())

    def _hand_on(self, reading: Reading, counts: Counts) -> None:
        self.publish(counts, reading.extra())
        self._published = time.monotonic()

    def _start_timer(self, seconds: float) -> None:
        self._timer = threading.Timer(max(seconds, 0.0), self._flush)
        self._timer.daemon = True
        self._timer.start()

    def _flush(self) -> None:
        with self._lock:
            self._timer, reading = None, self._trailing
            if reading is None:
                return  # new steps are running, and publish by themselves
            if not reading.ready():
                return self._start_timer(RETRY_S)
            self._trailing = None
            self._hand_on(reading, reading.counts())

    def _log(self, counts: Counts, extra: Sequence[torch.Tensor], now: float) -> None:
        new = counts - self._last
        if new.rounds or new.verify_rows:
            logger.info(new.line(now - self._since))
        for further in self.more:
            if line := further(extra):
                logger.info(line)
        self._since, self._last = now, counts

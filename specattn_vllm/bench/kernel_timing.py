"""Time of one call, as it is in production: inside a CUDA graph, with its operands in device memory and not in L2.

The calls of one measurement rotate over operands (cache layers, mostly) that together exceed L2 several times; about 20
of them are captured back to back, the graph is replayed, and its time divided by their number. So no launch overhead is
measured, and no cached data. What cannot be captured is timed call by call, L2 flushed before each, and says so.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

CALLS = 20  # in a graph
WARM_MS = 2.0  # how long the GPU is kept busy while the host queues the measurement


class Timing(NamedTuple):
    """Milliseconds of one call: median, 10th and 90th percentile over `samples` measurements of `calls` calls each."""

    ms: float
    ms_p10: float
    ms_p90: float
    samples: int
    calls: int
    how: str  # graph | events | wall
    note: str = ""


class ContextLost(RuntimeError):
    """The CUDA context is unusable after a kernel's fault: nothing more can be measured in this process."""


def summary(values: Sequence[float], calls: int, how: str, note: str = "") -> Timing:
    ordered = sorted(values)
    last = len(ordered) - 1
    p10, p90 = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    return Timing(statistics.median(ordered), p10, p90, len(ordered), calls, how, note)


class Clock:
    """Times calls on one device; `budget_ms` of device time for each measurement."""

    def __init__(self, device: torch.device, budget_ms: float = 30.0) -> None:
        self.device = device
        self.budget_ms = budget_ms
        self.l2 = 0
        if device.type == "cuda":
            self.l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * max(self.l2, 1 << 25), dtype=torch.int8, device=device)

    def __call__(self, calls: Sequence[Callable[[], object]]) -> Timing:
        """calls: the same operation on different operands."""
        if self.device.type != "cuda":
            return self._wall(calls)
        try:
            return self._cuda(calls)
        except Exception as error:
            try:
                torch.cuda.synchronize(self.device)
            except Exception as lost:
                raise ContextLost(f"{error} ({lost})") from error
            raise

    def _wall(self, calls: Sequence[Callable[[], object]]) -> Timing:
        calls[0]()
        times = []
        for i in range(5):
            start = time.perf_counter()
            calls[i % len(calls)]()
            times.append((time.perf_counter() - start) * 1e3)
        return summary(times, 1, "wall")

    def _cuda(self, calls: Sequence[Callable[[], object]]) -> Timing:
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # compiles, and fills the caches that a capture may not fill
                call()
            stream.synchronize()
            begin, end = _events(2)
            begin.record()
            for call in calls:
                call()
            end.record()
            stream.synchronize()
            estimate = max(begin.elapsed_time(end) / len(calls), 1e-3)
            per_graph = max(min(CALLS, int(self.budget_ms / (3 * estimate))), 1)
            if len(calls) <= CALLS:  # each operand as often as the others
                per_graph = max(per_graph // len(calls), 1) * min(len(calls), per_graph)
            try:
                graph = _capture([calls[i % len(calls)] for i in range(per_graph)])
            except Exception as error:
                stream.synchronize()
                # A capture that broke leaves torch's random numbers in the state of a capture; one that works ends it.
                _capture([self._flush[:1].zero_]).reset()
                return self._eager(calls, estimate, f"not captured in a graph: {_line(error)}")
            samples = max(min(int(self.budget_ms / (estimate * per_graph)), 40), 5)
            graph.replay()
            times = self._replay(graph.replay, samples, stream)
            graph.reset()
        return summary([t / per_graph for t in times], per_graph, "graph")

    def _eager(self, calls: Sequence[Callable[[], object]], estimate: float, note: str) -> Timing:
        samples = max(min(int(self.budget_ms / estimate), 40), 5)
        events = _events(2 * samples)
        for i in range(samples):
            self._flush.zero_()
            events[2 * i].record()
            calls[i % len(calls)]()
            events[2 * i + 1].record()
        torch.cuda.synchronize()
        return summary([a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True)], 1, "events", note)

    @staticmethod
    def _replay(replay: Callable[[], None], samples: int, stream: torch.cuda.Stream) -> list[float]:
        events = _events(samples + 1)
        # Everything is queued while the GPU is busy with this, so no gap between replays is the host's.
        torch.cuda._sleep(int(WARM_MS * 2e6))
        events[0].record()
        for event in events[1:]:
            replay()
            event.record()
        stream.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def _capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of calls on the current stream. `torch.cuda.graph` would empty the allocator's cache each time."""
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # a collected tensor or graph would free memory in the midst of the capture
    try:
        graph.capture_begin()
        try:
            for call in calls:
                call()
        except Exception:
            with contextlib.suppress(Exception):
                graph.capture_end()
            raise
        graph.capture_end()
    finally:
        gc.enable()
    return graph


def _events(n: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(n)]


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}".rstrip(": ")

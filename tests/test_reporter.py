"""When a line is logged and when totals are published; that nobody waits for the device."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from specattn_vllm import reporter
from specattn_vllm.reporter import Reporter
from specattn_vllm.stats import Counters, Counts


@pytest.fixture
def lines(caplog):
    """The lines logged so far. vLLM's logger may not propagate, so the handler goes to ours."""
    logger = logging.getLogger("vllm.specattn")
    caplog.set_level(logging.INFO, logger=logger.name)
    logger.addHandler(caplog.handler)
    # Where it does propagate, pytest's handler is on the root as well.
    was, logger.propagate = logger.propagate, False
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.propagate = was
    logger.removeHandler(caplog.handler)


@pytest.fixture
def clock(monkeypatch):
    """clock.now is the time."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(reporter, "time", clock)
    return clock


def test_one_line_per_interval(lines, clock):
    counters = Counters(torch.device("cpu"))
    report = Reporter(counters, interval_s=10)
    for _ in range(100):  # 25 s of steps, one verified row each
        clock.now += 0.25
        counters.add(rounds=1, sampled_tokens=2)
        report.tick()
    assert len(lines()) == 2
    for line in lines():
        assert line.startswith("specattn: 40 rounds in 10 s, acceptance length 2.00")


def test_each_line_is_about_its_own_interval(lines, clock):
    counters = Counters(torch.device("cpu"))
    report = Reporter(counters, interval_s=10)
    for seconds, rounds in ((10, 5), (30, 7)):
        clock.now += seconds
        counters.add(rounds=torch.tensor(rounds))
        report.tick()
    assert [line.split(",")[0] for line in lines()] == ["specattn: 5 rounds in 10 s", "specattn: 7 rounds in 30 s"]


def test_further_lines_follow_when_one_is_due_and_have_something_to_say(lines, clock):
    report, asked = Reporter(Counters(torch.device("cpu")), interval_s=10), iter(["audit of 3", None])
    report.extra = lambda: [torch.tensor([3])]
    report.more.append(lambda tensors: next(asked) if tensors[0].tolist() == [3] else "other tensors")
    for seconds in (5, 5, 5, 5):
        clock.now += seconds
        report.tick()
    assert lines() == ["audit of 3"]
    assert next(asked, "asked twice") == "asked twice"


def test_an_idle_interval_is_silent_and_not_added_to_the_next(lines, clock):
    counters = Counters(torch.device("cpu"))
    report = Reporter(counters, interval_s=10)
    counters.add(prefill_rows=3)
    clock.now += 100
    report.tick()
    assert lines() == []
    clock.now += 10
    counters.add(rounds=1)
    report.tick()
    (line,) = lines()
    assert line.startswith("specattn: 1 rounds in 10 s")
    assert "prefill" not in line


def test_nothing_is_read_before_something_is_due(clock):
    class Unread:
        def begin_read(self, extra):
            raise AssertionError("read before the interval was over")

    report = Reporter(Unread(), interval_s=10)
    for _ in range(9):
        clock.now += 1
        report.tick()
    clock.now += 1
    with pytest.raises(AssertionError, match="before the interval"):
        report.tick()


class SlowCounters:
    """Totals that take their time: `arrived` says whether what was asked for is there. Looking too early is an error,
    as it would be a wait."""

    def __init__(self):
        self.readings, self.steps = [], 0

    def begin_read(self, extra):
        self.readings.append(SlowReading(Counts(rounds=self.steps)))
        return self.readings[-1]


class SlowReading:
    def __init__(self, counts):
        self.total, self.arrived = counts, False

    def ready(self):
        return self.arrived

    def counts(self):
        assert self.arrived, "waited for the device"
        return self.total

    def extra(self):
        assert self.arrived, "waited for the device"
        return []


@pytest.fixture
def slow(clock):
    """A reporter of slow counters that publishes into `report.seen`, [rounds]; step(seconds) is a step of an engine."""
    report = Reporter(SlowCounters(), interval_s=10)
    report.seen = []
    report.publish = lambda counts, beside: report.seen.append(counts.rounds)

    def step(seconds=0.25):
        clock.now += seconds
        report.counters.steps += 1
        report.tick()

    report.step = step
    return report


def test_no_step_waits_for_totals_and_one_reading_is_on_its_way_at_a_time(slow):
    for _ in range(20):
        slow.step()
    assert len(slow.counters.readings) == 1
    assert slow.seen == []
    slow.counters.readings[0].arrived = True
    slow.step()
    assert slow.seen == [4]


def test_totals_are_published_once_a_second_at_most(slow, clock):
    for _ in range(400):
        slow.step(0.01)
        for reading in slow.counters.readings:
            reading.arrived = True
    assert len(slow.seen) == 3


def test_the_line_waits_for_its_totals_too(slow, clock, lines):
    slow.publish = None
    slow.step(10)
    slow.step()
    assert lines() == []
    slow.counters.readings[0].arrived = True
    slow.step()
    (line,) = lines()
    # As of the step in which the reading began.
    assert line.startswith("specattn: 1 rounds in 10 s")


def test_a_rank_that_does_not_log_reads_for_its_publications_alone(slow, lines):
    slow.logs, slow.publish = False, None
    slow.step(100)
    assert slow.counters.readings == [] and lines() == []


@pytest.fixture
def quick(monkeypatch):
    """A reporter in real time, that publishes each 50 ms at most."""
    monkeypatch.setattr(reporter, "PUBLISH_S", 0.05)
    monkeypatch.setattr(reporter, "RETRY_S", 0.02)
    report = Reporter(SlowCounters(), interval_s=1000)
    report.seen = []
    report.publish = lambda counts, beside: report.seen.append(counts.rounds)
    return report


def wait_for(true) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_last_steps_counted_follows_when_the_engine_is_idle(quick):
    folded = []
    quick.fold = lambda: folded.append(1)
    quick.counters.steps = 7
    quick.idle()
    (reading,) = quick.counters.readings
    time.sleep(0.15)
    assert quick.seen == [], "published what is not there"
    reading.arrived = True
    wait_for(lambda: quick.seen)
    assert (quick.seen, folded) == ([7], [1])
    assert quick._timer is None


def test_many_short_requests_share_a_timer(quick):
    for step in range(1, 6):
        quick.counters.steps = step
        quick.idle()
        quick.counters.readings[-1].arrived = True
    wait_for(lambda: quick.seen)
    time.sleep(0.1)
    assert quick.seen == [5]


def test_a_step_takes_over_from_the_timer(quick):
    quick.idle()
    quick.counters.readings[-1].arrived = True
    quick.tick()
    wait_for(lambda: quick._timer is None)
    assert quick.seen == []


def test_nothing_is_published_before_there_are_requests(quick):
    quick.publish = None
    quick.idle()
    assert quick.counters.readings == [] and quick._timer is None


def test_it_begins_anew_when_the_counters_do(lines, clock):
    """What was counted of warm-up is in no later line."""
    counters = Counters(torch.device("cpu"))
    report = Reporter(counters, interval_s=10)
    counters.add(rounds=6, sampled_tokens=6)
    clock.now += 11
    report.tick()
    counters.reset()
    report.reset()
    counters.add(rounds=2, sampled_tokens=6)
    clock.now += 5
    report.tick()
    assert len(lines()) == 1
    clock.now += 6
    report.tick()
    assert lines()[1].startswith("specattn: 2 rounds in 11 s, acceptance length 3.00")

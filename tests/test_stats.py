"""Counts, counters and the log line."""

from __future__ import annotations

import itertools
import logging
from dataclasses import fields

import pytest
import torch

from specattn_vllm import stats
from specattn_vllm.kernels.bookkeeping.contracts import READ_COUNTS
from specattn_vllm.stats import Counters, Counts, Reporter

NAMES = [field.name for field in fields(Counts)]


def test_the_difference_of_counts_is_field_by_field():
    later = Counts(*range(100, 100 + len(NAMES)))
    earlier = Counts(*range(0, 3 * len(NAMES), 3))
    difference = later - earlier
    for i, name in enumerate(NAMES):
        assert getattr(difference, name) == 100 + i - 3 * i


def test_acceptance_length_is_tokens_per_round():
    assert Counts(rounds=4, sampled_tokens=10).acceptance_length == 2.5


def test_kv_fraction_is_what_was_read_of_what_there_was():
    assert Counts(kv_read=30, kv_full=120).kv_fraction == 0.25


def test_nothing_counted_divides_nothing():
    assert Counts().acceptance_length == 0.0
    # Nothing pruned is everything read.
    assert Counts().kv_fraction == 1.0


def test_the_line_says_it_all():
    counts = Counts(
        rounds=8,
        sampled_tokens=20,
        verify_rows=16,
        sparse_rows=6,
        no_selection_rows=3,
        stale_rows=1,
        refresh_rows=2,
        audit_rows=4,
        prefill_rows=5,
        kv_read=1,
        kv_full=8,
    )
    # 16 rows could have been sparse and 10 were not.
    assert counts.line(59.6) == (
        "specattn: 8 rounds in 60 s, acceptance length 2.50, verification read 12.5% of KV, "
        "dense verification rows 10 (no selection 3, stale 1, refresh 2, audit 4), prefill rows 5"
    )


def test_the_line_says_what_the_draft_read_where_it_read_less():
    assert ", drafting read 25.0% of KV, dense" in Counts(verify_rows=1, draft_kv_read=2, draft_kv_full=8).line(1)
    assert Counts(draft_kv_read=2, draft_kv_full=8).line(1).endswith("(no row was pruned), drafting read 25.0% of KV")
    assert "drafting" not in Counts(verify_rows=1).line(1)
    assert Counts().draft_kv_fraction == 1.0


def test_counters_add_host_and_device_amounts_to_the_same_total():
    counters = Counters(torch.device("cpu"))
    counters.add(rounds=2, kv_read=5)
    counters.add(rounds=torch.tensor(3), kv_read=torch.tensor(7, dtype=torch.int32), stale_rows=1)
    counters.add(rounds=torch.tensor(True), prefill_rows=4)
    counters.add()
    assert counters.read() == Counts(rounds=6, kv_read=12, stale_rows=1, prefill_rows=4)


def test_reading_takes_nothing_away():
    counters = Counters(torch.device("cpu"))
    counters.add(rounds=1, kv_full=torch.tensor(9))
    assert counters.read() == counters.read() == Counts(rounds=1, kv_full=9)


def test_every_count_has_its_own_counter():
    counters = Counters(torch.device("cpu"))
    for i, name in enumerate(NAMES, start=1):
        counters.add(**{name: i})
        counters.add(**{name: torch.tensor(10 * i)})
    assert counters.read() == Counts(*(11 * i for i in range(1, len(NAMES) + 1)))


def test_counts_do_not_overflow_32_bits():
    # A day of long contexts: layers * heads * tokens * rows.
    counters = Counters(torch.device("cpu"))
    for _ in range(3):
        counters.add(kv_full=torch.tensor(2**31), kv_read=2**31)
    assert counters.read() == Counts(kv_full=3 * 2**31, kv_read=3 * 2**31)


@pytest.mark.parametrize("amount", [1, torch.tensor(1)], ids=["host", "device"])
def test_an_unknown_name_is_an_error(amount):
    with pytest.raises(ValueError, match="not in"):
        Counters(torch.device("cpu")).add(rouns=amount)


# Reporter


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
    monkeypatch.setattr(stats, "time", clock)
    return clock


def test_one_line_per_interval(lines, clock):
    counters = Counters(torch.device("cpu"))
    reporter = Reporter(counters, interval_s=10)
    for _ in range(100):  # 25 s of steps, one verified row each
        clock.now += 0.25
        counters.add(rounds=1, sampled_tokens=2)
        reporter.tick()
    assert len(lines()) == 2
    for line in lines():
        assert line.startswith("specattn: 40 rounds in 10 s, acceptance length 2.00")


def test_each_line_is_about_its_own_interval(lines, clock):
    counters = Counters(torch.device("cpu"))
    reporter = Reporter(counters, interval_s=10)
    for seconds, rounds in ((10, 5), (30, 7)):
        clock.now += seconds
        counters.add(rounds=torch.tensor(rounds))
        reporter.tick()
    assert [line.split(",")[0] for line in lines()] == ["specattn: 5 rounds in 10 s", "specattn: 7 rounds in 30 s"]


def test_further_lines_follow_when_one_is_due_and_have_something_to_say(lines, clock):
    reporter, asked = Reporter(Counters(torch.device("cpu")), interval_s=10), iter(["audit of 3", None])
    reporter.more.append(lambda: next(asked))
    for seconds in (5, 5, 5, 5):
        clock.now += seconds
        reporter.tick()
    assert lines() == ["audit of 3"]
    assert next(asked, "asked twice") == "asked twice"


def test_an_idle_interval_is_silent_and_not_added_to_the_next(lines, clock):
    counters = Counters(torch.device("cpu"))
    reporter = Reporter(counters, interval_s=10)
    counters.add(prefill_rows=3)
    clock.now += 100
    reporter.tick()
    assert lines() == []
    clock.now += 10
    counters.add(rounds=1)
    reporter.tick()
    (line,) = lines()
    assert line.startswith("specattn: 1 rounds in 10 s")
    assert "prefill" not in line


def test_the_device_is_only_waited_for_when_a_line_is_due(clock):
    class Unread:
        def read(self):
            raise AssertionError("read before the interval was over")

    reporter = Reporter(Unread(), interval_s=10)
    for _ in range(9):
        clock.now += 1
        reporter.tick()
    clock.now += 1
    with pytest.raises(AssertionError):
        reporter.tick()


def test_staged_amounts_count_only_once_committed():
    """A step that vLLM runs to warm up is staged like any other, and then discarded."""
    counters = Counters(torch.device("cpu"))
    counters.stage(verify_rows=3, kv_read=torch.tensor(5))
    counters.discard()
    counters.commit()
    assert counters.read() == Counts()
    counters.stage(verify_rows=3, kv_read=torch.tensor(5))
    counters.stage(verify_rows=1)
    counters.commit()
    counters.commit()
    assert counters.read() == Counts(verify_rows=4, kv_read=5)


def test_a_vector_counts_once_committed():
    counters = Counters(torch.device("cpu"))
    amounts = torch.tensor([2, 2**33, 5])
    counters.stage_vector(("audit_rows", "kv_read", "kv_full"), amounts)
    counters.discard()
    counters.commit()
    assert counters.read() == Counts()
    counters.stage_vector(("audit_rows", "kv_read", "kv_full"), amounts)
    counters.stage_vector(("verify_rows", "sparse_rows"), torch.tensor([7, 8]))
    counters.stage(audit_rows=10)
    counters.commit()
    counters.commit()
    assert counters.read() == Counts(audit_rows=12, kv_read=2**33, kv_full=5, verify_rows=7, sparse_rows=8)
    assert amounts.tolist() == [2, 2**33, 5]
    counters.stage_vector(("stale_rows",), torch.tensor([1]))
    counters.reset()
    counters.commit()
    assert counters.read() == Counts()


def test_a_vector_is_of_counters_in_their_order():
    counters = Counters(torch.device("cpu"))
    for i, (first, second) in enumerate(itertools.pairwise(NAMES), start=1):
        counters.stage_vector((first, second), torch.tensor([i, 0]))
    counters.commit()
    assert counters.read() == Counts(*range(1, len(NAMES)))
    for names in (("kv_full", "kv_read"), ("rounds", "kv_read"), ("kv_full", "rounds")):
        with pytest.raises(ValueError, match="do not follow one another"):
            counters.stage_vector(names, torch.tensor([1, 1]))


def test_what_counting_kernels_write_can_be_staged():
    Counters(torch.device("cpu")).stage_vector(READ_COUNTS, torch.zeros(len(READ_COUNTS), dtype=torch.int64))


def test_a_total_on_the_device_can_be_added_to():
    counters = Counters(torch.device("cpu"))
    counters.add(sampled_tokens=1, kv_read=torch.tensor(3))
    for _ in range(2):
        counters.on_device("sampled_tokens").add_(2**32)
    assert counters.read() == Counts(sampled_tokens=1 + 2**33, kv_read=3)
    counters.reset()
    assert counters.on_device("sampled_tokens").tolist() == [0]


def test_a_reset_forgets_what_was_counted_and_what_was_staged():
    """What ran while CUDA graphs were captured is nobody's."""
    counters = Counters(torch.device("cpu"))
    counters.add(rounds=3, kv_full=torch.tensor(9))
    counters.stage(verify_rows=2, kv_read=torch.tensor(5))
    counters.reset()
    counters.commit()
    assert counters.read() == Counts()
    counters.add(rounds=1, kv_full=torch.tensor(4))
    assert counters.read() == Counts(rounds=1, kv_full=4)


def test_the_line_without_pruned_rows_claims_no_fraction():
    assert Counts(rounds=2, sampled_tokens=7).line(60).endswith("verification read all of KV (no row was pruned)")

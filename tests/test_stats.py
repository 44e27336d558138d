"""Counts, counters and the log line."""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest
import torch

from specattn_vllm.kernels.bookkeeping.contracts import READ_COUNTS
from specattn_vllm.stats import Counters, Counts

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
        no_selection_rows=9,
        stale_rows=1,
        prefill_rows=5,
        kv_read=1,
        kv_full=8,
    )
    # 16 rows could have been sparse and 10 were not.
    assert counts.line(59.6) == (
        "specattn: 8 rounds in 60 s, acceptance length 2.50, verification read 12.5% of KV, "
        "dense verification rows 10 (exact 0, small batch 0, no selection 9, stale 1), prefill rows 5"
    )


def test_the_line_tells_rows_that_are_dense_on_purpose_from_those_without_a_selection():
    chosen_by_draft = Counts(verify_rows=9, sparse_rows=2, no_selection_rows=7, exact_rows=1, small_batch_rows=4)
    assert "dense verification rows 7 (exact 1, small batch 4, no selection 2, stale 0" in chosen_by_draft.line(1)
    by_itself = Counts(verify_rows=9, sparse_rows=2, kv_scanned=1, kv_full=2, exact_rows=1, small_batch_rows=4)
    assert "dense rows 7 (exact 1, small batch 4, short context 2)" in by_itself.line(1)


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


def test_a_reading_is_of_the_moment_at_which_it_began():
    counters, beside = Counters(torch.device("cpu")), torch.tensor([1, 2])
    counters.add(rounds=1, kv_full=torch.tensor(9))
    reading = counters.begin_read([beside])
    counters.add(rounds=1, kv_full=torch.tensor(9))
    beside += 1
    assert reading.ready()
    assert reading.counts() == Counts(rounds=1, kv_full=9)
    assert [t.tolist() for t in reading.extra()] == [[1, 2]]


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
    counters.stage_vector(("stale_rows", "kv_read", "kv_full"), amounts)
    counters.discard()
    counters.commit()
    assert counters.read() == Counts()
    counters.stage_vector(("stale_rows", "kv_read", "kv_full"), amounts)
    counters.stage_vector(("verify_rows", "sparse_rows"), torch.tensor([7, 8]))
    counters.stage(stale_rows=10)
    counters.commit()
    counters.commit()
    assert counters.read() == Counts(stale_rows=12, kv_read=2**33, kv_full=5, verify_rows=7, sparse_rows=8)
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

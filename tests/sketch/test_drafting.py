"""What a round's first step chooses by, what its later steps read, and what is counted. No engine starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from specattn_vllm import executors
from specattn_vllm.kernels.sketch.contracts import Budget
from specattn_vllm.sketch.drafting import DraftSketch
from specattn_vllm.sketch.step import Shape, Sketch
from specattn_vllm.stats import Counters

CPU = torch.device("cpu")
STEPS = 3
SHAPE = Shape(
    layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    dtype=torch.float32,
    element_size=4,
    max_query_len=STEPS + 2,
    max_num_reqs=4,
    max_model_len=512,
)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def drafting() -> DraftSketch:
    counters = Counters(CPU)
    budget = Budget(0.25, shared="none", min_tokens=64)
    operations = executors.resolve("torch", CPU)
    return DraftSketch(Sketch(operations, budget, 2, SHAPE, counters, CPU, steps_ahead=STEPS - 1), counters)


def test_rejected_drafts_have_no_say_in_what_is_read(drafting):
    """Of a row's tokens in a round's first step, the drafts that were rejected stand last."""
    for valid in ((5, 2, 1), (1, 5, 4)):
        drafting.begin(SimpleNamespace(seq_lens=numbers(300, 200, 100)), numbers(0, 5, 10, 15), numbers(*valid))
        assert drafting.sketch.valid_lens[:3].tolist() == [*valid]


def test_later_steps_read_what_the_first_chose_and_all_newer_tokens(drafting):
    first = drafting.begin(SimpleNamespace(seq_lens=numbers(300, 200, 100)), numbers(0, 5, 10, 15), numbers(5, 2, 1))
    assert (first.num_rows, first.num_tokens, first.follows) == (3, 15, False)
    kept = drafting.sketch.kept
    kept[:, :3] = numbers(80, 70, 0)[:, None]  # the last row only pads a graph's batch
    kept[1, 0, 1] = 75
    for newer in (1, 2):
        lens = numbers(300 + newer, 200 + newer, 100 + newer)
        step = drafting.follow(SimpleNamespace(seq_lens=lens))
        assert (step.num_rows, step.num_tokens, step.max_query_len, step.follows) == (3, 3, 1, True)
        wanted = kept[:, :3] + newer
        wanted[:, 2] = 0
        assert torch.equal(drafting.sketch.following[:, :3], wanted)


def test_a_round_is_counted_with_all_of_its_steps(drafting):
    drafting.begin(SimpleNamespace(seq_lens=numbers(300, 40)), numbers(0, 5, 7), numbers(5, 2))
    drafting.sketch.kept[:, 0], drafting.sketch.kept[:, 1] = 80, 40
    drafting.count(numbers(302, 42), numbers(5, 2), STEPS)
    seen, heads = drafting.counters.read(), SHAPE.layers * SHAPE.num_kv_heads
    assert seen.draft_kv_full == heads * (300 + 301 + 302 + 40 + 41 + 42)
    assert seen.draft_kv_read == heads * (80 + 81 + 82 + 40 + 41 + 42)
    assert seen.draft_kv_scanned == heads * 295, "the second row's context is read whole, and not searched"


def test_rows_that_are_all_long_choose_nothing(drafting):
    assert drafting.begin(SimpleNamespace(seq_lens=numbers(300)), numbers(0, 100)) is None
    assert drafting.follow(SimpleNamespace(seq_lens=numbers(301))) is None

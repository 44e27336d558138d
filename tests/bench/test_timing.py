"""Which stretch of a generation is timed, and what comes out of it."""

import pytest

from specattn_vllm.bench.schema import CellResult, Sample
from specattn_vllm.bench.worker import NoWindow, Step, is_steady, window


def generation(starts: list[int], rounds: list[int], generated: int, seconds: float) -> list[Step]:
    """Requests whose first token comes in step `starts[i]` and which then get `rounds[i]` tokens in each."""
    steps, totals = [], [0] * len(starts)
    for index in range(1000):
        tokens = {}
        for request, start in enumerate(starts):
            if index >= start and totals[request] < generated:
                new = min(1 if index == start else rounds[request], generated - totals[request])
                totals[request] += new
                tokens[request] = new
        # The slow parts at both ends: prefill of the late, and nothing that may count.
        slow = index <= max(starts) or max(totals) > generated - 2 * max(rounds)
        time = (steps[-1].time if steps else 100.0) + (50.0 if slow else seconds)
        steps.append(Step(time, tokens))
        if min(totals) == generated:
            return steps
    raise AssertionError


def test_only_the_stretch_in_which_all_decode_counts():
    sample = window(generation([0, 3], [4, 3], 60, 0.01), batch=2, generated=60, round_tokens=4)
    assert sample.seconds_per_round == pytest.approx(0.01)
    assert sample.tokens_per_round == pytest.approx(3.5)
    assert sample.tokens / sample.seconds == pytest.approx(700)


def test_plain_decoding_has_a_token_a_round():
    sample = window(generation([0, 0, 1], [1, 1, 1], 40, 0.02), batch=3, generated=40, round_tokens=1)
    assert sample.tokens_per_round == 1
    # 40 steps, but: the first of the last request, two to settle, the step that time runs from, two rounds at the end.
    assert sample.rounds == 40 - 1 - 2 - 1 - 2
    assert sample.tokens / sample.seconds == pytest.approx(150)


def test_steps_without_tokens_take_time_and_are_no_rounds():
    steps = generation([0, 0], [2, 2], 40, 0.01)
    with_empty = [entry for step in steps for entry in (step, Step(step.time + 0.001, {}))]
    assert window(with_empty, 2, 40, 2) == window(steps, 2, 40, 2)


def test_a_request_that_a_step_leaves_out_has_no_round():
    steps = generation([0, 0], [2, 2], 60, 0.01)
    halved = [*steps[:10], Step(steps[9].time + 0.005, {0: 2})]
    halved += [Step(step.time + 0.01, step.tokens) for step in steps[10:]]
    sample, whole = window(halved, 2, 60, 2), window(steps, 2, 60, 2)
    assert sample.rounds == whole.rounds - 0.5  # request 0 is a round nearer to its end
    assert sample.tokens_per_round == 2


def test_a_batch_that_never_decodes_as_a_whole_is_no_measurement():
    with pytest.raises(NoWindow, match="all 2 requests"):
        window(generation([0, 12], [4, 4], 40, 0.01), batch=2, generated=40, round_tokens=4)
    with pytest.raises(NoWindow):
        window(generation([0], [4], 8, 0.01), batch=1, generated=8, round_tokens=4)


def sample(milliseconds: float, tokens_per_round: float = 3.5) -> Sample:
    tokens = int(20 * tokens_per_round)
    return Sample(tokens=tokens, seconds=20 * milliseconds / 1000, rounds=20, tokens_per_round=tokens_per_round)


@pytest.mark.parametrize(
    ("times", "steady"),
    [([], False), ([10], False), ([10, 10.2], True), ([10, 9.8], True), ([10, 10.4], False), ([10, 10, 11], False)],
)
def test_steady(times, steady):
    assert is_steady([sample(time) for time in times]) is steady


def test_steady_is_about_time_and_not_about_luck():
    assert is_steady([sample(10, 3.0), sample(10, 4.0)])


def test_summary():
    cell = CellResult(name="1x1k", batch=1, prompt_tokens=1024, counts={"kv_read": 30, "kv_full": 120})
    cell.samples = [sample(10), sample(30), sample(20)]
    cell.summarise()
    assert (cell.tokens_per_second, cell.tokens_per_second_range) == (175.0, (116.67, 350.0))
    assert (cell.milliseconds_per_round, cell.milliseconds_per_round_range) == (20.0, (10.0, 30.0))
    assert cell.tokens_per_round == 3.5
    assert cell.kv_read == 0.25


def test_summary_of_stock_vllm_says_nothing_about_kv():
    cell = CellResult(name="1x1k", batch=1, prompt_tokens=1024, samples=[sample(10)])
    cell.summarise()
    assert cell.kv_read is None

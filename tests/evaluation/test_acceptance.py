"""Acceptance along the text: by hand, against drafting by simulation; what is kept of a draft until it is verified."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specattn_vllm.evaluation import figures as compute
from specattn_vllm.evaluation import settings
from specattn_vllm.evaluation.forcing import Drafted, Forcing, ForcingError
from specattn_vllm.evaluation.results import DraftResult
from specattn_vllm.evaluation.scores import Acceptance


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_a_round_s_tokens_by_hand():
    found = Acceptance(2)
    # Overlaps 0.5 + 0.2 + 0.1 and 0.2 + 0.1 + 0.1; the same favourite in the first alone.
    target = logits((0.5, 0.3, 0.2), (0.2, 0.1, 0.7))
    draft = logits((0.7, 0.2, 0.1), (0.6, 0.3, 0.1))
    found.add(1, target, draft)
    found.add(0, target, draft)
    _, round_ = found.results()
    assert round_.accepted == pytest.approx([0.8, 0.4])
    assert round_.tokens == pytest.approx(1 + 0.8 + 0.8 * 0.4)
    assert round_.agreed == [1, 0] and round_.greedy_tokens == 2
    # In another round, in which the first is never accepted, the second is of no use.
    found.add(1, logits((1.0, 0.0, 0.0), (0.2, 0.1, 0.7)), logits((0.0, 1.0, 0.0), (0.2, 0.1, 0.7)))
    both = found.results()[1]
    assert both.rounds == 2
    assert both.tokens == pytest.approx((1 + 0.8 + 0.32 + 1) / 2)
    assert both.accepted == pytest.approx([0.4, 0.7])
    assert (both.agreed, both.greedy_tokens) == ([0.5, 0.5], 1.5)


def test_a_draft_is_accepted_as_often_as_rejection_sampling_accepts_it():
    make = torch.Generator().manual_seed(0)
    target, draft = torch.randn(3, 40, generator=make) * 2, torch.randn(3, 40, generator=make) * 2
    found = Acceptance(1)
    found.add(0, target, draft)
    p, q = target.softmax(-1), draft.softmax(-1)
    drawn = torch.multinomial(q, 200_000, replacement=True, generator=make)
    accepted = torch.rand(drawn.shape, generator=make) * q.gather(1, drawn) < p.gather(1, drawn)
    [result] = found.results()
    assert result.accepted == pytest.approx(accepted.double().mean(1).tolist(), abs=0.005)
    assert result.tokens == pytest.approx(1 + accepted.cumprod(0).sum(0).double().mean().item(), abs=0.01)


def test_what_a_padded_vocabulary_has_more_is_never_accepted():
    found = Acceptance(1)
    found.add(0, logits((0.5, 0.5)), logits((0.25, 0.25, 0.5)))
    [result] = found.results()
    assert result.accepted == pytest.approx([0.5])
    assert result.agreed == [0]


def test_drafts_are_kept_by_slot_and_step_until_they_are_verified():
    kept, made = Drafted(3), torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    assert kept.round_of(0, torch.tensor([7, 8, 9])) is None, "where nothing was drafted yet"
    for step in range(2):
        # The third row only fills a graph's batch.
        rows = torch.cat((made[:, step], torch.full((1, 5), torch.nan)))
        positions = torch.tensor([7 + step, 20 + step, 0])
        kept.keep(rows, positions, torch.tensor([2, 0, -1]), torch.tensor(step), 2)
    assert torch.equal(kept.round_of(2, torch.tensor([7, 8, 9])), made[0])
    assert torch.equal(kept.round_of(0, torch.tensor([20, 21, 22])), made[1])
    assert kept.round_of(2, torch.tensor([7])) is None, "a step without drafts is no round"
    with pytest.raises(ForcingError, match=r"made at positions \[7, 8\], and verified at \[8, 9, 10\]"):
        kept.round_of(2, torch.tensor([8, 9, 10]))


def test_a_draft_step_is_kept_whether_or_not_its_token_is_forced():
    """Through the hook itself, which the engine's graphs are made of."""
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

    speculator = SimpleNamespace(
        use_local_argmax_reduction=False,
        num_speculative_steps=2,
        compute_draft_logits=lambda hidden, step: hidden * 2,
        _maybe_predict_acceptance=lambda *given: None,
    )
    forcing = Forcing(2, 6, torch.device("cpu"))
    with forcing.installed(), forcing.through({"doc-0": [10, 11, 12, 13, 14, 15]}, lambda *seen: None):
        forcing._seat(SimpleNamespace(idx_mapping_np=np.array([1]), req_ids=["doc-0-abc"]))
        hidden = torch.eye(3)
        for step in range(2):
            where, slots = torch.tensor([2 + step]), torch.tensor([1])
            tokens = DraftModelSpeculator.sample_draft(
                speculator, hidden[[step]], where, slots, None, None, torch.tensor(step), None
            )
            assert tokens.tolist() == [13 + step]
        assert torch.equal(forcing._drafted.round_of(1, torch.tensor([2, 3, 4])), hidden[:2] * 2)


def drafts(rounds: int, tokens: float, greedy: float) -> DraftResult:
    return DraftResult(rounds=rounds, tokens=tokens, greedy_tokens=greedy, accepted=[0.5], agreed=[0.5])


def test_the_length_is_over_all_rounds_and_differences_are_paired(half, of_documents):
    dense = of_documents(settings.DENSE, drafts=[drafts(10, 3.0, 2.0), drafts(30, 4.0, 3.0)])
    less = of_documents(half, drafts=[drafts(10, 2.5, 2.0), drafts(30, 3.5, 2.0)])
    found = compute.figures(less, dense)
    assert found["text_tokens"].value == pytest.approx((25 + 105) / 40)
    assert found["text_greedy_tokens"].value == pytest.approx(2)
    assert found["text_tokens"].interval[0] < found["text_tokens"].value < found["text_tokens"].interval[1]
    more = compute.difference(less, dense)
    assert (more["text_tokens"].value, more["text_tokens"].interval) == (
        pytest.approx(-0.5),
        pytest.approx((-0.5, -0.5)),
    )
    assert math.isclose(more["text_greedy_tokens"].value, -30 / 40)

"""Logits to figures, by hand; and the table that forced drafts are read from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from specattn_vllm.evaluation.forcing import NO_TEXT, Forcing, ForcingError
from specattn_vllm.evaluation.scores import Scores, kl_divergence


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_kl_is_that_of_the_definition():
    expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert kl_divergence(log(0.5, 0.25, 0.25), log(0.25, 0.5, 0.25)).item() == pytest.approx(expected, abs=1e-6)


def test_what_the_dense_run_rules_out_adds_nothing_to_kl():
    assert kl_divergence(log(1.0, 0.0), log(0.5, 0.5)).item() == pytest.approx(math.log(2), abs=1e-6)
    assert kl_divergence(log(1.0, 0.0), log(1.0, 0.0)).item() == 0.0


@pytest.fixture
def logits() -> torch.Tensor:
    """[2 documents, 5 positions, 50]"""
    return torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0)) * 5


def score(scores: Scores, logits: torch.Tensor) -> int:
    """In stretches that do not come in order, the last longer than what is wanted."""
    following = torch.arange(5)
    return sum(
        scores.add(document, first, following[first:], logits[document, first : first + count])
        for document, first, count in ((1, 0, 2), (0, 0, 2), (1, 2, 3), (0, 2, 3))
    )


def test_the_dense_run_differs_from_itself_by_rounding_alone(logits, tmp_path):
    scores = Scores(2, 4, tmp_path, write=True)
    assert np.isnan(scores.nll).all()
    assert score(scores, logits) == 8
    assert np.isfinite(scores.nll).all()
    expected = torch.nn.functional.cross_entropy(logits[1, :4], torch.arange(4), reduction="none")
    assert scores.nll[1] == pytest.approx(expected.numpy(), abs=1e-5)
    assert np.abs(scores.kl).max() < 1e-5
    assert scores.agrees.all()


def test_another_run_is_compared_with_it_position_by_position(logits, tmp_path):
    dense = Scores(2, 4, tmp_path, write=True)
    score(dense, logits)
    dense.close()
    other = logits.clone()
    other[0, 1] = -other[0, 1]
    scores = Scores(2, 4, tmp_path, write=False)
    score(scores, other)
    expected = kl_divergence(logits[0, 1:2].log_softmax(-1), other[0, 1:2].log_softmax(-1)).item()
    assert scores.kl[0, 1] == pytest.approx(expected, rel=1e-3)
    differs = np.zeros((2, 4), dtype=bool)
    differs[0, 1] = True
    assert ((scores.kl > 1e-3) == differs).all()
    assert (~scores.agrees == differs).all()


def test_a_reference_of_another_evaluation_is_refused(logits, tmp_path):
    dense = Scores(2, 4, tmp_path, write=True)
    score(dense, logits)
    dense.close()
    with pytest.raises(ValueError, match=r"holds \(2, 4, 50\), wanted \(2, 3, 50\)"):
        score(Scores(2, 3, tmp_path, write=False), logits)


@pytest.fixture
def forcing() -> Forcing:
    """Two slots, of which slot 1 holds a text of 6 tokens."""
    forcing = Forcing(2, 6, torch.device("cpu"))
    batch = Batch([1], ["doc-0-abc"])
    with forcing.through({"doc-0": [10, 11, 12, 13, 14, 15]}, lambda *seen: None):
        forcing._seat(batch)
        yield forcing


class Batch:
    """What `_seat` reads of vLLM's InputBatch."""

    def __init__(self, slots: list[int], requests: list[str]) -> None:
        self.idx_mapping_np, self.req_ids = np.array(slots), requests


def draft(forcing: Forcing, positions: list[int], slots: list[int]) -> list[int]:
    own = torch.full((len(slots),), 7)
    return forcing._draft(own, torch.tensor(positions), torch.tensor(slots)).tolist()


def test_a_draft_is_the_token_after_its_position(forcing):
    assert draft(forcing, [0, 4, 2], [1, 1, 1]) == [11, 15, 13]


@pytest.mark.parametrize(
    ("position", "slot"), [(2, 0), (2, -1), (5, 1), (600, 1)], ids=["free slot", "padding", "end", "far past the end"]
)
def test_without_text_the_draft_s_own_choice_stands(forcing, position, slot):
    assert draft(forcing, [position], [slot]) == [7]


def test_a_slot_s_next_request_has_a_text_of_its_own(forcing):
    forcing._texts = {"doc-0": [10], "doc-1": [20, 21, 22]}
    forcing._seat(Batch([1], ["doc-1-def"]))
    assert draft(forcing, [0, 1, 2], [1, 1, 1]) == [21, 22, 7]


def test_a_request_without_text_among_forced_ones_is_an_error(forcing):
    with pytest.raises(ForcingError, match="free-0-xyz"):
        forcing._seat(Batch([0], ["free-0-xyz"]))


def test_afterwards_nothing_is_forced():
    forcing = Forcing(1, 4, torch.device("cpu"))
    with forcing.through({"doc-0": [1, 2, 3, 4]}, lambda *seen: None):
        forcing._seat(Batch([0], ["doc-0-abc"]))
        assert draft(forcing, [0], [0]) == [2]
    assert draft(forcing, [0], [0]) == [7]
    assert (forcing._table == NO_TEXT).all()


def test_the_hooks_are_gone_afterwards():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

    before = DraftModelSpeculator.sample_draft, GPUModelRunner.sample
    with pytest.raises(KeyError), Forcing(1, 4, torch.device("cpu")).installed():
        assert (DraftModelSpeculator.sample_draft, GPUModelRunner.sample) != before
        raise KeyError
    assert (DraftModelSpeculator.sample_draft, GPUModelRunner.sample) == before

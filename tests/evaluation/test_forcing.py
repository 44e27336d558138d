"""What forcing counts where requests run free, without an engine: each request's own rounds and tokens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specattn_vllm.evaluation.engine import free_run
from specattn_vllm.evaluation.forcing import Forcing, ForcingError
from specattn_vllm.stats import Counts


def batch(requests: list[str], drafts: list[int] | None, prefilling: list[bool]) -> SimpleNamespace:
    return SimpleNamespace(
        req_ids=[f"{name}-a1b2" for name in requests],  # vLLM's own part is not the caller's name
        num_draft_tokens_per_req=None if drafts is None else np.array(drafts),
        is_prefilling_np=np.array(prefilling),
    )


BATCHES = (
    (batch(["free-0", "free-1"], None, [True, True]), [1, 1]),
    # One verified, one at its prompt still, which vLLM pads to a verification's length; one more row is padding.
    (batch(["free-0", "free-1"], [4, 4], [False, True]), [3, 1, 9]),
    # One without drafts: a plain decoding step is no round.
    (batch(["free-1", "free-0"], [4, 0], [False, False]), [5, 1]),
    (batch(["free-1"], [4], [False]), [1]),
)


def test_rounds_are_counted_by_request():
    forcing = Forcing(2, 8, torch.device("cpu"))
    with forcing.counting() as counted:
        for given, sampled in BATCHES:
            forcing._count(given, torch.tensor(sampled))
    assert counted == {"free-0": [1, 3], "free-1": [2, 6]}


@pytest.mark.parametrize(("total", "fits"), [((3, 9), True), ((4, 9), False), ((3, 10), False)])
def test_counts_by_document_that_do_not_add_up_to_the_plugin_s_are_refused(total, fits, monkeypatch):
    from specattn_vllm.evaluation import engine

    forcing = Forcing(2, 8, torch.device("cpu"))

    def generate(llm, prompts, tokens):
        for given, sampled in BATCHES:
            forcing._count(given, torch.tensor(sampled))
        return {name: [7] for name in prompts}

    counts = iter([Counts(), Counts(rounds=total[0], sampled_tokens=total[1])])
    monkeypatch.setattr(engine, "generate", generate)
    monkeypatch.setattr(engine, "counts", lambda llm: next(counts))
    job = SimpleNamespace(documents=[[1, 2, 3], [4, 5, 6]], context=2, free_tokens=4)
    if fits:
        assert free_run(None, job, forcing)[1:] == ([[1, 3], [2, 6]], [[7], [7]])
    else:
        with pytest.raises(ForcingError, match="by document they are"):
            free_run(None, job, forcing)

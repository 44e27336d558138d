"""What forcing counts where requests run free, without an engine: each request's own rounds and tokens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specattn_vllm.evaluation.engine import CacheTooSmallError, at_a_time, check_complete, free_run
from specattn_vllm.evaluation.forcing import Forcing, ForcingError
from specattn_vllm.evaluation.scores import Scores
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

    def generate(llm, job, prompts, tokens):
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


@pytest.mark.parametrize(
    ("blocks", "most"),
    # 100 tokens are 7 blocks of 16, and one block is nobody's.
    [(1000, 3), (22, 3), (21, 2), (15, 2), (14, 1), (8, 1)],
)
def test_no_more_run_at_a_time_than_the_cache_holds(blocks, most, capsys):
    cache = SimpleNamespace(num_gpu_blocks=blocks, block_size=16)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache)))
    job = SimpleNamespace(max_model_len=100, batch=3, name="half")
    assert at_a_time(llm, job) == most
    told = f"half: the KV cache holds {most} requests at a time, not --batch 3\n"
    assert capsys.readouterr().out == ("" if most == 3 else told)
    cache.num_gpu_blocks = 7
    with pytest.raises(CacheTooSmallError, match="7 blocks of 16 tokens, which do not hold one request of 100"):
        at_a_time(llm, job)


def test_what_was_not_verified_and_what_is_no_number_are_told_apart(tmp_path):
    scores = Scores(2, 3, tmp_path, write=True)
    scores.add(0, 0, torch.tensor([0, 1, 2]), torch.zeros(3, 5))
    scores.add(1, 0, torch.tensor([0, 1]), torch.zeros(2, 5))
    with pytest.raises(ForcingError, match=r"^1 of 6 positions were never verified, .* position 2 of document 1"):
        check_complete(scores)
    scores.add(1, 2, torch.tensor([0]), torch.full((1, 5), torch.nan))
    with pytest.raises(ForcingError, match=r"^1 of 6 positions .* have logits that are no numbers, .* 2 of document 1"):
        check_complete(scores)
    scores.add(1, 2, torch.tensor([0]), torch.zeros(1, 5))
    check_complete(scores)

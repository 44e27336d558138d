"""Forced runs in a cache that holds fewer requests than are asked for at a time: none of them may lose its place.

A request that is preempted comes back with a prompt of all its tokens, which reads everything: the token after it is
not verified, and what earlier pruned passes left in the cache is gone.
"""

from __future__ import annotations

import numpy as np
import pytest

from specattn_vllm.stats import Counts

pytestmark = pytest.mark.engine

CONTEXT, POSITIONS, STEPS = 200, 60, 4


@pytest.fixture
def job(demo_pair, prompts):
    from specattn_vllm.evaluation.job import Job, text_tokens
    from specattn_vllm.evaluation.schema import Setting

    def make(options: dict, **engine_options) -> Job:
        length = text_tokens(CONTEXT, POSITIONS, STEPS)
        return Job(
            setting=Setting(name="x", options=options),
            target=demo_pair[0],
            draft=demo_pair[1],
            models={},
            documents=[prompt["prompt_token_ids"] for prompt in prompts([length] * 5)],
            context=CONTEXT,
            positions=POSITIONS,
            draft_tokens=STEPS,
            free_tokens=16,
            batch=5,
            device="cpu",
            dtype="float32",
            engine_options=engine_options,
        )

    return make


def test_as_many_run_at_a_time_as_the_cache_holds(job, tmp_path, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    from specattn_vllm.evaluation.engine import run

    preempted, preempt = [], Scheduler._preempt_request

    def watch(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", watch)
    options = {"method": "specattn", "rule": "top_k", "ratio": 0.2, "min_tokens": 0}
    # 17 blocks hold a document's 261 tokens; all five begin in the blocks of three, and grow.
    small = job(options, block_size=16, num_gpu_blocks_override=3 * 18 + 1)
    roomy = job(options)
    run(job({"method": "dense"}), tmp_path)
    found, expected = run(small, tmp_path), run(roomy, tmp_path)
    assert not preempted
    assert np.allclose(found.scores.nll, expected.scores.nll, atol=1e-3)
    assert Counts.stored(found.result.forced) == Counts.stored(expected.result.forced)  # but for the time

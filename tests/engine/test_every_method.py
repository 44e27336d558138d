"""What holds for each method, in an engine with blocks for few requests, so that some are preempted and come back.

A method that is added is given a line in `SETTINGS`, and is then tested like the others.
"""

from __future__ import annotations

import pytest

from specattn_vllm.methods import METHODS

pytestmark = pytest.mark.engine

SHORT = {"min_tokens": 16, "recent_tokens": 8}
SETTINGS = {
    "sketch": SHORT | {"ratio": 0.1, "draft_ratio": 0.2},
    "specattn": SHORT | {"ratio": 0.1},
    "sts": SHORT | {"ratio": 0.1},
    "vegas": SHORT | {"ratio": 0.1, "crossover_tokens": 0},
    "streamingllm": SHORT | {"ratio": 0.1, "crossover_tokens": 0},
    "dense": SHORT | {"sparse_draft": True, "ratio": 0.1},
}
"""Options with which a part is read of contexts of a few hundred tokens."""
EVERYTHING = {"ratio": 1.0}
NEW_TOKENS = 48

METHOD = pytest.mark.parametrize("method", SETTINGS)


@pytest.fixture
def crowd(small_pool, prompts, monkeypatch):
    """crowd(llm): tokens by request, 'exact0', 'a1', 'exact2' and so on; one more is aborted on the way."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request

    def watch(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", watch)

    def run(llm) -> dict[str, list[int]]:
        engine, done = llm.llm_engine, {}
        gone, *given = prompts([300, *small_pool.lengths])
        for i, prompt in enumerate(given):
            name, extra = (f"exact{i}", {"specattn": "exact"}) if i % 2 == 0 else (f"a{i}", None)
            parameters = SamplingParams(
                temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, extra_args=extra
            )
            if i == 1:
                engine.add_request("gone", gone, parameters)
            engine.add_request(name, prompt, parameters)
        steps = 0
        while engine.has_unfinished_requests():
            done |= {o.request_id: list(o.outputs[0].token_ids) for o in engine.step() if o.finished}
            steps += 1
            if steps == 2:
                engine.abort_request(["gone"])
        assert preempted, "the pool is large enough for all"
        assert {name: len(tokens) for name, tokens in done.items() if name != "gone"} == {
            name: NEW_TOKENS for name in ("exact0", "a1", "exact2", "a3")
        }
        return done

    return run


def test_each_method_is_tested():
    ours = {name for name, method in METHODS.items() if method.options.__module__.startswith("specattn_vllm.")}
    assert ours <= {*SETTINGS}, "a method was added: give it a line in SETTINGS"


@METHOD
def test_who_asks_for_it_gets_plain_decoding_and_who_is_lossless_gives_it_to_all(
    method, plain, small_pool, crowd, engine, prompts, counts
):
    expected = plain(prompts([300, *small_pool.lengths])[1:], NEW_TOKENS)
    llm = engine({"method": method} | SETTINGS[method], **small_pool.arguments)
    done = crowd(llm)
    for i, name in enumerate(("exact0", "a1", "exact2", "a3")):
        if name.startswith("exact") or METHODS[method].lossless:
            assert done[name] == expected[i], name
    seen = counts(llm)
    assert seen.rounds > 10 and seen.acceptance_length > 1
    if METHODS[method].lossless:
        assert seen.sparse_rows == 0
        assert 0 < seen.draft_kv_read < seen.draft_kv_full
        assert seen.draft_selection_ns > 0
        return
    assert seen.exact_rows > 0 < seen.sparse_rows
    assert seen.sparse_rows + seen.exact_rows <= seen.verify_rows
    assert 0 < seen.kv_read < seen.kv_full
    assert seen.selection_ns > 0
    assert seen.small_batch_rows == seen.stale_rows == 0


@METHOD
def test_who_reads_everything_gives_plain_decoding(method, plain, small_pool, crowd, engine, prompts, counts):
    expected = plain(prompts([300, *small_pool.lengths])[1:], NEW_TOKENS)
    llm = engine({"method": method} | SETTINGS[method] | EVERYTHING | {"min_tokens": 0}, **small_pool.arguments)
    done = crowd(llm)
    assert [done[name] for name in ("exact0", "a1", "exact2", "a3")] == expected
    seen = counts(llm)
    assert seen.kv_read == seen.kv_full
    if METHODS[method].target_reads == "draft's choice":
        assert seen.sparse_rows > 0, "nothing went through a selection"

"""`refresh_every` and `audit_floor`: which verifications of a request read everything, in whole engines."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture
def pattern(monkeypatch):
    """pattern[request] is a letter for each row of it past its prompt: S read a selection, D everything."""
    from vllm.v1.worker.gpu.states import RequestState

    from specattn_vllm.selection.pruner import Pruner

    owner, seen = {}, {}
    add_request, prune = RequestState.add_request, Pruner.prune

    def watch_add(self, req_id, *args, **kwargs):
        result = add_request(self, req_id, *args, **kwargs)
        owner[self.req_id_to_index[req_id]] = req_id.split("-")[0]
        return result

    def watch_prune(self, **step):
        plan = prune(self, **step)
        for row in range(0 if plan is None else plan.num_rows):
            if step["prefilling_cpu"][row]:
                continue
            kept, present = plan.kept[:, row].flatten().tolist(), int(step["seq_lens"][row])
            # Of prompts as long as these a selection leaves something out, in every source.
            letter = "D" if kept == [present] * len(kept) else "S"
            assert letter == "D" or max(kept) < present
            name = owner[int(step["slots"][row])]
            seen[name] = seen.get(name, "") + letter
        return plan

    monkeypatch.setattr(RequestState, "add_request", watch_add)
    monkeypatch.setattr(Pruner, "prune", watch_prune)
    return seen


def is_regular(letters: str, every: int) -> bool:
    """Whether of each `every` verifications the last was dense."""
    return letters == ("S" * (every - 1) + "D") * (len(letters) // every) + "S" * (len(letters) % every)


OPTIONS = {"top_p": 0.5, "min_tokens": 16, "recent_tokens": 8, "refresh_every": 3}


def test_each_third_verification_of_each_request_reads_everything(engine, prompts, pattern, counts):
    """Two requests, of which the second comes when the first is between its turns."""
    from vllm import SamplingParams

    llm = engine(OPTIONS)
    run, parameters = llm.llm_engine, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False)
    first, second = prompts([700, 900])
    run.add_request("first", first, parameters)
    while len(pattern.get("first", "")) < 4:
        run.step()
    run.add_request("second", second, parameters)
    while run.has_unfinished_requests():
        run.step()
    assert all(is_regular(letters, 3) and len(letters) >= 9 for letters in pattern.values()), pattern
    assert sorted(pattern) == ["first", "second"]
    seen = counts(llm)
    assert seen.refresh_rows == sum(letters.count("D") for letters in pattern.values())
    assert seen.sparse_rows == seen.verify_rows - seen.refresh_rows
    assert seen.no_selection_rows == seen.stale_rows == 0


def test_after_an_audit_that_finds_too_little_a_request_reads_everything_for_a_while(
    engine, greedy, prompts, pattern, counts
):
    """No selection retains all: each that is read is audited, and followed by three verifications without one."""
    options = {"top_p": 0.5, "min_tokens": 16, "recent_tokens": 8}
    llm = engine(options | {"audit_share": 1.0, "audit_floor": 1.0, "audit_dense_rounds": 3})
    greedy(llm, prompts([700, 900]), 56)
    assert len(pattern) == 2
    for letters in pattern.values():
        assert len(letters) >= 9 and letters == ("SDDD" * len(letters))[: len(letters)], pattern
    seen = counts(llm)
    assert seen.audit_rows == sum(letters.count("D") for letters in pattern.values())
    assert seen.sparse_rows == seen.verify_rows - seen.audit_rows
    assert seen.audited_pairs > 0 and seen.no_selection_rows == seen.stale_rows == seen.refresh_rows == 0


def test_after_preemption_the_count_starts_again(small_pool, engine, greedy, prompts, audit, counts):
    llm = engine(OPTIONS, **small_pool.arguments)
    greedy(llm, prompts(small_pool.lengths), 56)
    assert audit.preemptions > 0
    seen = counts(llm)
    assert seen.refresh_rows > 8
    assert seen.no_selection_rows + seen.stale_rows == 0
    # A third at most: a count that starts again is one that was not finished.
    assert 0.2 < seen.refresh_rows / seen.verify_rows < 1 / 3


def test_preemption_ends_what_an_audit_began(small_pool, engine, greedy, prompts, audit, counts):
    """Each request reads one selection, is found below the floor, and would read everything from then on."""
    options = {"top_p": 0.5, "min_tokens": 16, "recent_tokens": 8}
    options |= {"audit_share": 1.0, "audit_floor": 1.0, "audit_dense_rounds": 1000}
    llm = engine(options, **small_pool.arguments)
    greedy(llm, prompts(small_pool.lengths), 40)
    assert audit.preemptions > 0
    seen = counts(llm)
    assert 4 < seen.sparse_rows <= 4 + audit.preemptions
    assert seen.audit_rows == seen.verify_rows - seen.sparse_rows > 0

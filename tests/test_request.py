"""What one request may ask for: validated where the client is told, passed on when the worker takes the request up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specattn_vllm import compat
from specattn_vllm.request import asks_for_exactness, problem
from specattn_vllm.selection.store import SelectionStore
from specattn_vllm.stats import Counters


@pytest.mark.parametrize("extra", [None, {}, {"other": 1}, {"specattn": "exact"}, {"specattn": "exact", "other": 1}])
def test_good_arguments(extra):
    assert problem(extra) is None


@pytest.mark.parametrize("value", ["Exact", "", "dense", 1, 0, None, ["exact"]])
def test_wrong_arguments_are_named_with_the_remedy(value):
    message = problem({"specattn": value})
    assert repr(value) in message
    assert "the only value is 'exact'" in message and "leave it out" in message


@pytest.mark.parametrize("name", ["spec_attn", "SpecAttn", "spec-attn", "specatn", "specattn_exact", "spec_attention"])
def test_near_misses_of_our_key_are_named_with_the_remedy(name):
    message = problem({"other": 1, name: "exact"})
    assert message.startswith(repr(name)) and "give {'specattn': 'exact'}" in message


@pytest.mark.parametrize("name", ["sparse_attn", "speculation", "spec", "method", "exact"])
def test_arguments_of_others_are_their_own_business(name):
    assert problem({name: "exact"}) is None


def test_vllm_refuses_them_as_the_client_s_error():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    compat.check_request()
    compat.check_request()  # plugins load more than once
    exact = SamplingParams(extra_args={"specattn": "exact"})
    assert exact.extra_args == {"specattn": "exact"}
    # Cached blocks may come from pruned steps of others.
    assert exact.skip_reading_prefix_cache and not SamplingParams().skip_reading_prefix_cache
    with pytest.raises(VLLMValidationError, match="the only value is 'exact'"):
        SamplingParams(extra_args={"specattn": "approximate"})
    with pytest.raises(VLLMValidationError, match=r"'spec_attn' .* is not a name that anything reads"):
        SamplingParams(extra_args={"spec_attn": "exact"})
    with pytest.raises(VLLMValidationError, match="temperature"):
        SamplingParams(temperature=-1.0)


@pytest.mark.parametrize(
    ("params", "exact"),
    [
        (None, False),  # pooling
        (SimpleNamespace(extra_args=None), False),
        (SimpleNamespace(extra_args={"other": "exact"}), False),
        (SimpleNamespace(extra_args={"specattn": "exact"}), True),
    ],
)
def test_who_asks(params, exact):
    assert asks_for_exactness(params) is exact


def test_requests_are_seen_once_each_by_the_last_who_watches():
    taken, first, second = [], [], []

    class ModelState:
        def add_request(self, req_index, new_req_data):
            taken.append(req_index)
            return "result"

    state = ModelState()
    compat.watch_new_requests(state, "same", lambda slot, request: first.append((slot, request)))
    # vLLM calls set_attn again after profiling.
    compat.watch_new_requests(state, "same", lambda slot, request: second.append((slot, request)))
    compat.watch_new_requests(state, "other", lambda slot, request: second.append(slot))
    assert state.add_request(3, "request") == "result"
    assert (taken, first, second) == ([3], [], [(3, "request"), 3])


def test_the_first_request_is_the_first_that_somebody_asked_for():
    acts = []
    state = SimpleNamespace(add_request=lambda slot, request: acts.append(request.req_id))
    for _ in range(2):
        compat.at_first_request(state, lambda: acts.append("reset"))
    for name in ("_warmup_0", "_v2_mixed_warmup_1", "a", "_warmup_2", "b"):
        state.add_request(0, SimpleNamespace(req_id=name))
    assert acts == ["_warmup_0", "_v2_mixed_warmup_1", "reset", "a", "_warmup_2", "b"]


def test_what_vllm_ran_to_warm_up_is_in_no_counts():
    """Neither before the first request, from whose counts others are subtracted, nor after it."""
    from vllm.v1.worker.worker_base import WorkerBase

    compat.add_worker_method()
    counters, state = Counters(torch.device("cpu")), SimpleNamespace(add_request=lambda slot, request: None)
    compat.at_first_request(state, counters.reset)
    worker = SimpleNamespace(model_runner=SimpleNamespace(specattn_counters=counters, model_state=state))
    for name, rounds in (("_warmup_0", 0), ("a", 7), ("b", 14)):
        state.add_request(0, SimpleNamespace(req_id=name))
        counters.add(rounds=7)
        assert WorkerBase.specattn_stats(worker)["rounds"] == rounds


def test_a_slot_is_exact_for_as_long_as_such_a_request_holds_it():
    store = SelectionStore(1, 4, 1, 32, torch.device("cpu"))
    assert not store.exact.any()
    store.hold(2, True)
    store.hold(3, False)
    assert store.exact.tolist() == [False, False, True, False, False]
    store.hold(2, True)
    assert store.exact.tolist() == [False, False, True, False, False]
    store.hold(2, False)
    assert not store.exact.any()

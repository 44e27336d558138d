"""Patches of a process that runs the model: its drafter, its steps, its requests, and its RPC methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from specattn_vllm.compat.names import ATTACH_PATH, MARK, is_ours, resolve

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


def choose_speculator() -> None:
    from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as upstream

    stock = upstream.StandaloneARSpeculator
    if getattr(stock, MARK, False):
        return

    def build(vllm_config: VllmConfig, device: torch.device):
        if not is_ours(vllm_config):
            return stock(vllm_config, device)
        from specattn_vllm.options import SpecAttnOptions

        return resolve(SpecAttnOptions.from_vllm(vllm_config).speculator)(vllm_config, device)

    setattr(build, MARK, True)
    build.stock = stock
    upstream.StandaloneARSpeculator = build


def stock_speculator() -> type:
    """vLLM's own class, even if `choose_speculator` has replaced its name in this process."""
    from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as upstream

    return getattr(upstream.StandaloneARSpeculator, "stock", upstream.StandaloneARSpeculator)


def prepare_cpu_worker() -> None:
    """Called by the metadata builder, so only in a worker that uses the backend, and before it samples."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.sample.ops import topk_topp_sampler

        from specattn_vllm.cpu_runner.interpreter import accept_integer_masks, compute_log1p, leave_out_needless_work

        topk_topp_sampler.HAS_TRITON = False
        accept_integer_masks()
        compute_log1p()
        leave_out_needless_work()


def attach_to_runner() -> None:
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    except ImportError:
        return  # without a working Triton, runner V2 cannot be imported; the start-up checks refuse runner V1

    original = GPUModelRunner.load_model
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_ours(self.vllm_config):
            resolve(ATTACH_PATH)(self)

    setattr(load_model, MARK, True)
    GPUModelRunner.load_model = load_model


def count_rounds(runner: Any, seen: Callable[[Any, Any], None]) -> None:
    """Call seen(input batch, sampled tokens by row) for each round of a drafter, if there is one, but not in dummy
    runs."""
    drafter = runner.speculator
    if drafter is None or not hasattr(drafter, "propose"):
        return
    original = drafter.propose
    parameters = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def propose(*args: Any, **kwargs: Any):
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if not given.get("dummy_run", False):
            seen(given["input_batch"], given["num_sampled"])
        return original(*args, **kwargs)

    drafter.propose = propose


def mark_dummy_runs(runner: Any, target: Any) -> None:
    """Keep target.dummy true while vLLM runs a warm-up step."""
    original = runner._dummy_run

    @functools.wraps(original)
    def dummy_run(*args: Any, **kwargs: Any):
        target.dummy = True
        try:
            return original(*args, **kwargs)
        finally:
            target.dummy = False

    runner._dummy_run = dummy_run


def is_warm_up(request: Any) -> bool:
    """Whether a request is one of vLLM's warm-up requests."""
    return request.req_id.startswith(("_warmup_", "_v2_mixed_warmup"))


def watch_new_requests(model_state: Any, name: str, seen: Callable[[int, Any], None]) -> None:
    """Call seen(slot, request data) for each new or resumed request of the worker. A second watcher of the same name
    replaces the first: vLLM calls `set_attn` again after profiling."""
    if not hasattr(model_state, "specattn_watchers"):
        original, watchers = model_state.add_request, {}

        @functools.wraps(original)
        def add_request(req_index, new_req_data):
            for watcher in [*watchers.values()]:
                watcher(req_index, new_req_data)
            return original(req_index, new_req_data)

        model_state.specattn_watchers, model_state.add_request = watchers, add_request
    model_state.specattn_watchers[name] = seen


def at_first_request(model_state: Any, act: Callable[[], None]) -> None:
    """Call act() before the first request that somebody asked for, after all of those by which vLLM warms up. Where
    vLLM captures no graphs, nothing else tells a worker that it is about to serve."""

    def seen(slot: int, request: Any) -> None:
        if not is_warm_up(request):
            del model_state.specattn_watchers["first"]
            act()

    watch_new_requests(model_state, "first", seen)


def waits_for_the_first(runner: Any) -> bool:
    """Whether `at_first_request` has still to act. A runner that was shut down has no model state any more."""
    return "first" in getattr(getattr(runner, "model_state", None), "specattn_watchers", ())


def watch_steps(runner: Any, seen: Callable[[Any], None]) -> None:
    """Call seen(scheduler output) at the start of each step of a runner, also of steps without tokens, but not of dummy
    runs. vLLM runs one step without tokens after the last request has ended."""
    original = runner.finish_requests

    @functools.wraps(original)
    def finish_requests(scheduler_output: Any) -> None:
        seen(scheduler_output)
        original(scheduler_output)

    runner.finish_requests = finish_requests


def add_worker_method() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, "specattn_stats"):
        return

    def specattn_stats(self) -> dict[str, int] | None:
        """Counts of this worker since the first request that somebody asked for; None without our backend. For
        `collective_rpc`."""
        from specattn_vllm.stats import Counts

        counters = getattr(self.model_runner, "specattn_counters", None)
        counters = getattr(getattr(self.model_runner, "speculator", None), "counters", counters)
        target = getattr(self.model_runner, "specattn_target", None)
        if target is not None:
            target.fold()
            counters = target.chooser.counts.counters
        if counters is None:
            return None
        # What vLLM ran to warm up is still counted until then. Whoever subtracts it later would get too few.
        return vars(Counts() if waits_for_the_first(self.model_runner) else counters.read())

    def specattn_audit(self) -> dict[str, dict[str, float]] | None:
        """Audit results of this worker since the first request that somebody asked for, by layer; None without an
        audit. For `collective_rpc`."""
        from specattn_vllm.backend.audits import audit_of

        audit = audit_of(self.model_runner)
        if audit is None:
            return None
        if waits_for_the_first(self.model_runner):
            return {}
        audit.fold()
        return audit.read().by_layer()

    WorkerBase.specattn_stats = specattn_stats
    WorkerBase.specattn_audit = specattn_audit

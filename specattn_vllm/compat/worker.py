"""Patches of a process that runs the model: its drafter, its steps, its requests, and its RPC methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from specattn_vllm.compat.names import BACKEND_NAME, is_ours, resolve
from specattn_vllm.compat.patching import patched


def choose_speculator() -> None:
    """Runner V2 chooses its speculator in a fixed chain and imports the class by name inside it. There is no extension
    point (`method="custom_class"` exists on runner V1 only). Remove when vLLM has a registry."""
    from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator

    @patched(speculator, "StandaloneARSpeculator")
    def build(stock, vllm_config: Any, device: Any):
        if not is_ours(vllm_config):
            return stock(vllm_config, device)
        from specattn_vllm.options import SpecAttnOptions

        return resolve(SpecAttnOptions.from_vllm(vllm_config).speculator)(vllm_config, device)


def stock_speculator() -> type:
    """vLLM's own class, even if `choose_speculator` has replaced its name in this process."""
    from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator

    return inspect.unwrap(speculator.StandaloneARSpeculator)


def prepare_cpu_worker() -> None:
    """vLLM's Triton kernel for top-k/top-p sampling does not run in Triton's interpreter ("'int' object has no
    attribute 'to'"), and the first such request stops the server. This selects vLLM's PyTorch version. It also corrects
    masks, log1p and isnan of the interpreter, and halves its time. CPU only. Remove when the kernel runs interpreted,
    or Triton compiles for CPU.

    Called by the metadata builder, so only in a worker that uses the backend, and before it samples."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.sample.ops import topk_topp_sampler

        from specattn_vllm.cpu_runner.interpreter import (
            accept_integer_masks,
            argmax_of_nan,
            compute_libdevice,
            leave_out_needless_work,
        )

        topk_topp_sampler.HAS_TRITON = False
        accept_integer_masks()
        argmax_of_nan()
        compute_libdevice()
        leave_out_needless_work()


def attach_to_runner() -> None:
    """A target that chooses for itself needs the loaded model and the runner before vLLM measures the memory left for
    the KV cache, and 'dense' beside vLLM's own drafter counts its rounds. Without a speculator of ours, no other code
    of the plugin runs at that time. Remove when backends have a hook after loading."""
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    except ImportError:
        return  # without a working Triton, runner V2 cannot be imported; the start-up checks refuse runner V1

    @patched(GPUModelRunner, "load_model")
    def load_model(original, self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_ours(self.vllm_config):
            resolve("specattn_vllm.backend.attach.attach")(self)


def without_adapters(runner: Any) -> AbstractContextManager[None]:
    """While it is open, a runner's model runs without LoRA adapters. Until its first step, layers with LoRA would read
    indices of adapters that nobody has set. Remove when a runner starts with no adapter chosen."""
    import numpy as np

    tokens = np.array([runner.max_num_tokens], dtype=np.int32)  # one request, of as many tokens as there may be
    return runner.maybe_select_dummy_loras(runner.lora_config, tokens)


def count_rounds(runner: Any, seen: Callable[[Any, Any], None]) -> None:
    """Call seen(input batch, sampled tokens by row) for each round of a drafter of vLLM's, if there is one, but not in
    dummy runs. Acceptance is only known where drafts are made. Remove if backends get a stats hook."""
    drafter = runner.speculator
    if drafter is None or not hasattr(drafter, "propose"):
        return
    signature = inspect.signature(drafter.propose)

    @patched(drafter, "propose")
    def propose(original, *args: Any, **kwargs: Any):
        given = signature.bind(*args, **kwargs).arguments
        if not given.get("dummy_run", False):
            seen(given["input_batch"], given["num_sampled"])
        return original(*args, **kwargs)


def mark_dummy_runs(runner: Any, target: Any) -> None:
    """Keep target.dummy true while vLLM runs a warm-up step, which a metadata builder cannot tell from a real one.
    Remove when the common metadata tells them apart."""

    @patched(runner, "_dummy_run")
    def dummy_run(original, *args: Any, **kwargs: Any):
        target.dummy = True
        try:
            return original(*args, **kwargs)
        finally:
            target.dummy = False


def name_rows(runner: Any) -> None:
    """Hybrid models (layers of attention beside those of Mamba or linear attention) have a model state of their own.
    It leaves `req_idx` out of the common metadata: without it a builder does not know to which request a row belongs,
    and takes each step for one of profiling. And it calls the last token of a prompt a decode, which is right for the
    other layers; ours read everything for prompts. Remove when `MambaHybridModelState.prepare_attn` passes `req_idx`
    on, as `DefaultModelState` does, and tells prompts from what may run as a decode."""
    owner = next(part for part in type(runner.model_state).__mro__ if "prepare_attn" in vars(part))
    if owner.__name__ not in ("DefaultModelState", "MambaHybridModelState"):
        raise ValueError(
            f"model state {owner.__name__}: it is not known to tell attention backends to which request a row belongs; "
            "serve this model with vLLM's own backends"
        )
    if not runner.model_config.is_hybrid:
        return
    from vllm.v1.worker.gpu.model_states import mamba_hybrid

    batches: list[Any] = []

    # Of the class and the module, both once: they share the list.
    @patched(mamba_hybrid.MambaHybridModelState, "prepare_attn")
    def prepare_attn(original, state, input_batch, *args: Any, **kwargs: Any):
        batches.append(input_batch)
        try:
            return original(state, input_batch, *args, **kwargs)
        finally:
            batches.pop()

    @patched(mamba_hybrid, "build_attn_metadata")
    def build_attn_metadata(original, *args: Any, **kwargs: Any):
        if batches:
            kwargs = {"req_idx": batches[-1].idx_mapping_np} | kwargs
            ours = {
                number
                for number, groups in enumerate(kwargs["attn_groups"])
                if any(group.backend.get_name() == BACKEND_NAME for group in groups)
            }
            _tell_prompts(kwargs["model_specific_attn_metadata"], batches[-1].is_prefilling_np, ours)
        return original(*args, **kwargs)


def _tell_prompts(metadata: Any, is_prefilling: Any, ours: set[int]) -> None:
    """Make what a model adds to the common metadata say of all prompts that they are, in the groups `ours` alone."""
    import torch

    original = metadata.get_extra_common_attn_kwargs

    def get_extra_common_attn_kwargs(group: int, num_reqs: int) -> dict[str, Any]:
        found = original(group, num_reqs)
        if group in ours:
            found["is_prefilling"] = torch.zeros(num_reqs, dtype=torch.bool)
            found["is_prefilling"][: len(is_prefilling)] = torch.from_numpy(is_prefilling)
        return found

    metadata.get_extra_common_attn_kwargs = get_extra_common_attn_kwargs


def is_warm_up(request: Any) -> bool:
    """Whether a request is one of vLLM's warm-up requests."""
    return request.req_id.startswith(("_warmup_", "_v2_mixed_warmup"))


def watch_new_requests(model_state: Any, name: str, seen: Callable[[int, Any], None]) -> None:
    """Call seen(slot, request data) for each new or resumed request of the worker. A second watcher of the same name
    replaces the first: vLLM calls `set_attn` again after profiling.

    The speculator sees requests only as rows of batches. Only the worker's `add_request` has their parameters, and
    tells the first real request from those of vLLM's warm-up. Remove when there is a hook for new requests."""
    if not hasattr(model_state, "specattn_watchers"):
        model_state.specattn_watchers = {}

        @patched(model_state, "add_request")
        def add_request(original, req_index, new_req_data):
            for watcher in [*model_state.specattn_watchers.values()]:
                watcher(req_index, new_req_data)
            return original(req_index, new_req_data)

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
    runs. The totals of a worker's last steps must be published when it is idle, and vLLM runs one step without tokens
    after the last request has ended. Remove if backends get a stats hook."""

    @patched(runner, "finish_requests")
    def finish_requests(original, scheduler_output: Any) -> None:
        seen(scheduler_output)
        original(scheduler_output)


def add_worker_method() -> None:
    """`collective_rpc("specattn_stats")` and `("specattn_audit")` need methods on the worker. Remove if backends get a
    stats hook."""
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, "specattn_stats"):
        return

    def specattn_stats(self) -> dict[str, int] | None:
        """Counts of this worker since the first request that somebody asked for; None without our backend."""
        from specattn_vllm.stats import Counts

        runner = self.model_runner
        counters = getattr(getattr(runner, "speculator", None), "counters", None)
        counters = counters or getattr(runner, "specattn_counters", None)
        target = getattr(runner, "specattn_target", None)
        if target is not None:
            target.fold()
            counters = target.chooser.counts.counters
        if counters is None:
            return None
        # What vLLM ran to warm up is still counted until then. Whoever subtracts it later would get too few.
        return vars(Counts() if waits_for_the_first(runner) else counters.read())

    def specattn_audit(self) -> dict[str, dict[str, float]] | None:
        """Audit results of this worker since the first request that somebody asked for, by layer; None without an
        audit."""
        audit = resolve("specattn_vllm.backend.audits.audit_of")(self.model_runner)
        if audit is None:
            return None
        if waits_for_the_first(self.model_runner):
            return {}
        audit.fold()
        return audit.read().by_layer()

    WorkerBase.specattn_stats, WorkerBase.specattn_audit = specattn_stats, specattn_audit

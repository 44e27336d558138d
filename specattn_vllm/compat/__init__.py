"""The only folder that patches vLLM. Each piece says why it is there and when it goes.

Ledger, for vLLM 0.32.0:

register_backend      `AttentionBackendEnum` members that are registered at run time pickle by value, and a spawned
                      worker unpickles its config before plugins load: "'...' is not a valid AttentionBackendEnum".
                      Goes when registered members pickle by name, or workers load plugins first.
choose_speculator     Runner V2 picks its speculator in a fixed chain and imports the class by name inside it; there is
                      no plug point (`method="custom_class"` exists on runner V1 only). Goes with a registry upstream.
allow_on_cpu          `CpuPlatform.get_attn_backend_cls` replaces every backend by CPU_ATTN without an error. Goes
                      when it honours registered backends.
prepare_cpu_worker    vLLM's Triton kernel for top-k/top-p sampling does not run in Triton's interpreter ("'int' object
                      has no attribute 'to'"), and the first such request stops the server. vLLM has a PyTorch version
                      beside it. Also mends the interpreter's masks and its log1p, and halves its time
                      (`cpu_runner/interpreter.py`).
                      CPU only. Goes when the kernel runs interpreted, or Triton compiles for CPU.
add_cli_aliases       vLLM's flags are `--spec-model` and `--spec-tokens`; ours are the words users look for. Goes if
                      vLLM takes them.
complete_speculation  `--speculative-model` without a number of tokens is an error in vLLM for a separate draft model,
                      and a model that drafts for itself would have to be named twice; the backend knows both. Goes if
                      vLLM gets defaults that a backend can set.
check_engine_config   Start-up checks need the finished config in the process of the user's command, where an error is
                      read; vLLM has no hook there. Goes with one.
check_request         A request's extra arguments are validated where `SamplingParams` is made, so that a wrong value is
                      the client's error (HTTP 400) and not the engine's; an exact request reads no cached blocks. Goes
                      when plugins may validate requests.
watch_new_requests    The speculator learns of requests as rows of batches; what they asked for is only in the worker's
                      `add_request`, and so is which request is the first that somebody asked for
                      (`at_first_request`). Wraps that method of one object. Goes with a hook for new requests.
attach_to_runner      A target that chooses for itself needs the loaded model and the runner before vLLM measures
                      what is left for the KV cache, and 'dense' beside a drafter of vLLM's has its rounds to count;
                      without a speculator of ours nothing of the plugin runs then. Wraps `GPUModelRunner.load_model`.
                      Goes with a hook for backends after loading.
capture_twice         A step in which no row chooses (a batch below the crossover, exact requests) needs no search, and
                      one costs a small batch up to a tenth. vLLM captures a full graph of the target for each batch
                      size; this captures another without the search, and replays the one that the step's metadata is
                      for. Wraps `capture` and `run_fullgraph` of `ModelCudaGraphManager`. Goes when a backend may have
                      graphs by its own key.
count_rounds          Acceptance is only known where drafts are made: wraps `propose` of one drafter that is not ours.
                      Goes if backends get a stats hook.
mark_dummy_runs       vLLM's steps for warming up look like real ones to a metadata builder. Wraps `_dummy_run` of one
                      runner. Goes when the common metadata says so.
add_worker_method     `collective_rpc("specattn_stats")` and `("specattn_audit")` need methods on the worker. Goes if
                      backends get a stats hook.

serve_metrics         `/metrics` serves the process's registry or, with several API servers, one that is made for each
                      request and that nobody can add to. Wraps `get_prometheus_registry`, by which a server begins, and
                      in such a server `collect` of prometheus_client's `MultiProcessCollector`
                      (`metrics/collect.py`). Goes with a hook for metrics of plugins.
watch_steps           The totals of a worker's last steps are to be seen once it is idle, and nothing of the plugin runs
                      then. Wraps `finish_requests` of one runner, which vLLM calls in each step, a last one without
                      tokens included. Goes if backends get a stats hook.

What is patched, and what is leaned on without a patch, stands in `leaned_on.py`, and is looked for before anything is
patched.

`apply_all` applies them in every vLLM process, but `prepare_cpu_worker`, which a worker applies. Each has an effect
once, whatever is called how often.
"""

from specattn_vllm.compat.graphs import capture_twice
from specattn_vllm.compat.names import is_ours, is_ours_in_part
from specattn_vllm.compat.start import (
    DEFAULT_DRAFT_LENGTH,
    SELF_DRAFT_LENGTH,
    add_cli_aliases,
    allow_on_cpu,
    check_engine_config,
    check_request,
    complete_speculation,
    load_backend_member,
    register_backend,
    serve_metrics,
)
from specattn_vllm.compat.worker import (
    add_worker_method,
    at_first_request,
    attach_to_runner,
    choose_speculator,
    count_rounds,
    is_warm_up,
    mark_dummy_runs,
    prepare_cpu_worker,
    stock_speculator,
    watch_new_requests,
    watch_steps,
)

__all__ = [
    "DEFAULT_DRAFT_LENGTH",
    "SELF_DRAFT_LENGTH",
    "add_cli_aliases",
    "add_worker_method",
    "allow_on_cpu",
    "apply_all",
    "at_first_request",
    "attach_to_runner",
    "capture_twice",
    "check_engine_config",
    "check_request",
    "choose_speculator",
    "complete_speculation",
    "count_rounds",
    "is_ours",
    "is_ours_in_part",
    "is_warm_up",
    "load_backend_member",
    "mark_dummy_runs",
    "prepare_cpu_worker",
    "register_backend",
    "serve_metrics",
    "stock_speculator",
    "watch_new_requests",
    "watch_steps",
]


def apply_all() -> None:
    """Apply every patch to this process."""
    register_backend()
    choose_speculator()
    allow_on_cpu()
    add_cli_aliases()
    check_engine_config()
    check_request()
    attach_to_runner()
    add_worker_method()
    serve_metrics()

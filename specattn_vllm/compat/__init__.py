"""The only folder that patches vLLM. For each patch, this list says why it exists and when it can be removed.

Patches, for vLLM 0.32.0:

register_backend      `AttentionBackendEnum` members that are registered at run time pickle by value, and a spawned
                      worker unpickles its config before plugins load: "'...' is not a valid AttentionBackendEnum".
                      Remove when registered members pickle by name, or workers load plugins first.
choose_speculator     Runner V2 chooses its speculator in a fixed chain and imports the class by name inside it. There
                      is no extension point (`method="custom_class"` exists on runner V1 only). Remove when vLLM has a
                      registry.
select_backend        Wraps `get_attn_backend_cls` of the platform. Layers with a sliding window get the backend that
                      vLLM would choose if none were named; `backend_per_kind` can name one for them, and has no word
                      for vLLM's own choice. Remove when a backend may decline layers. And `CpuPlatform` replaces every
                      backend by CPU_ATTN without an error. Remove when it accepts registered backends.
prepare_cpu_worker    vLLM's Triton kernel for top-k/top-p sampling does not run in Triton's interpreter ("'int' object
                      has no attribute 'to'"), and the first such request stops the server. This selects vLLM's PyTorch
                      version. It also corrects masks and log1p of the interpreter, and halves its time
                      (`cpu_runner/interpreter.py`).
                      CPU only. Remove when the kernel runs interpreted, or Triton compiles for CPU.
add_cli_aliases       vLLM's flags are `--spec-model` and `--spec-tokens`. This adds aliases that users look for. Remove
                      if vLLM adds them.
complete_speculation  For a separate draft model, vLLM refuses `--speculative-model` without a number of tokens. A model
                      that drafts for itself would have to be named twice. The backend can fill in both. Remove if vLLM
                      gets defaults that a backend can set.
check_engine_config   Start-up checks need the finished config in the process of the user's command, where the user sees
                      the error. vLLM has no hook there. Remove when it has one.
check_request         A request's extra arguments are validated when `SamplingParams` is made, so that a wrong value is
                      the client's error (HTTP 400) and not the engine's. Also makes exact requests read no cached
                      blocks. Remove when plugins may validate requests.
watch_new_requests    The speculator sees requests only as rows of batches. Only the worker's `add_request` has their
                      parameters, and tells the first real request from those of vLLM's warm-up (`at_first_request`).
                      Wraps that method of one object. Remove when there is a hook for new requests.
attach_to_runner      A target that chooses for itself needs the loaded model and the runner before vLLM measures the
                      memory left for the KV cache, and 'dense' beside vLLM's own drafter counts its rounds. Without a
                      speculator of ours, no other code of the plugin runs at that time. Wraps
                      `GPUModelRunner.load_model`. Remove when backends have a hook after loading.
capture_twice         A step in which no row chooses (a batch below the crossover, exact requests) needs no search. A
                      search would cost a small batch up to a tenth of its time. vLLM captures one full CUDA graph of
                      the target for each batch size. This captures a second one without the search, and replays the one
                      that fits the step's metadata. Wraps `capture` and `run_fullgraph` of `ModelCudaGraphManager`.
                      Remove when a backend may add its own key to graphs.
count_rounds          Acceptance is only known where drafts are made. Wraps `propose` of vLLM's own drafter. Remove if
                      backends get a stats hook.
mark_dummy_runs       A metadata builder cannot tell vLLM's warm-up steps from real ones. Wraps `_dummy_run` of one
                      runner. Remove when the common metadata tells them apart.
add_worker_method     `collective_rpc("specattn_stats")` and `("specattn_audit")` need methods on the worker. Remove if
                      backends get a stats hook.
serve_metrics         `/metrics` serves the registry of the process. With several API servers it serves a registry that
                      is made for each request, so nothing can be added to it. Wraps `get_prometheus_registry`, which
                      every server calls first, and with several servers `collect` of prometheus_client's
                      `MultiProcessCollector` (`metrics/collect.py`). Remove when plugins have a hook for metrics.
watch_steps           The totals of a worker's last steps must be published when it is idle, but no code of the plugin
                      runs then. Wraps `finish_requests` of one runner, which vLLM calls in each step, and once more
                      without tokens after the last request. Remove if backends get a stats hook.

`leaned_on.py` lists what is patched, and what is used without a patch. It checks that vLLM has these before anything is
patched. `apply_all` applies the patches in every vLLM process, except `prepare_cpu_worker`, which a worker applies.
Applying a patch a second time has no effect.
"""

from specattn_vllm.compat.graphs import capture_twice
from specattn_vllm.compat.names import is_our_layer, is_ours, is_ours_in_part
from specattn_vllm.compat.start import (
    add_cli_aliases,
    check_engine_config,
    check_request,
    complete_speculation,
    load_backend_member,
    register_backend,
    select_backend,
    serve_metrics,
    serve_parser,
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
    "add_cli_aliases",
    "add_worker_method",
    "apply_all",
    "at_first_request",
    "attach_to_runner",
    "capture_twice",
    "check_engine_config",
    "check_request",
    "choose_speculator",
    "complete_speculation",
    "count_rounds",
    "is_our_layer",
    "is_ours",
    "is_ours_in_part",
    "is_warm_up",
    "load_backend_member",
    "mark_dummy_runs",
    "prepare_cpu_worker",
    "register_backend",
    "select_backend",
    "serve_metrics",
    "serve_parser",
    "stock_speculator",
    "watch_new_requests",
    "watch_steps",
]


def apply_all() -> None:
    """Apply every patch to this process."""
    register_backend()
    choose_speculator()
    select_backend()
    add_cli_aliases()
    check_engine_config()
    check_request()
    attach_to_runner()
    add_worker_method()
    serve_metrics()

"""The only module that patches vLLM. Each piece says why it is there and when it goes.

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
                      the client's error (HTTP 400) and not the engine's. Goes when plugins may validate requests.
watch_new_requests    The speculator learns of requests as rows of batches; what they asked for, and what their prompts
                      say, is only in the worker's `add_request`. Wraps that method of one object. Goes with a hook
                      for new requests.
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

Leaned on without a patch: `speculation/speculator.py` and `sketch_speculator.py` override the methods in
SPECULATOR_HOOKS of upstream's speculator (`missing_hooks` looks for them at start-up) and read its
`last_token_indices`, `expanded_positions`, `expanded_input_ids`, `input_buffers`, `block_tables`, `draft_tokens`,
`attn_cg_support`, `dp_size` and `draft_watermarker`;
`speculation/graphs.py` builds on vLLM's `CudaGraphManager`, `InputBuffers` and `InputBatch.make_dummy`;
`capture_twice` reads and sets the manager's `graphs`, `_capture_descs` and `_capture_mem_samples`;
`speculation/wiring.py` reads the attention layers that vLLM has configured.

`apply_all` applies them in every vLLM process, but `prepare_cpu_worker`, which a worker applies. Each has an effect
once, whatever is called how often.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from specattn_vllm.request import problem

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKEND_NAME = "SPECATTN"
# By name, as vLLM keeps classes itself: they import this module, and are not needed before an engine starts.
BACKEND_PATH = "specattn_vllm.backend.backend.SpecAttnBackend"
SKETCH_SPECULATOR_PATH = "specattn_vllm.speculation.sketch_speculator.SketchSpeculator"
ATTACH_PATH = "specattn_vllm.backend.attach.attach"
CHECK_PATH = "specattn_vllm.checks.check"
_ALIASES = {"--spec-model": "--speculative-model", "--spec-tokens": "--num-speculative-tokens"}
# Method -> the argument that an override needs by name.
SPECULATOR_HOOKS = {
    "load_model": "target_model",
    "set_attn": "target_attn_groups",
    "init_cudagraph_manager": "cudagraph_mode",
    "capture": None,
    "propose": "dummy_run",
    "_build_attn_metadata": "query_start_loc_np",
    "_multi_step_decode": "num_rejected",
    "_run_model": None,
}
_MARK = "_specattn_patched"
DEFAULT_DRAFT_LENGTH = 4
SELF_DRAFT_LENGTH = 6
"""Drafts that cost as much as the target's own steps are accepted nearly always: more of them than of a small model's.
Vegas drafts 5 to 9 (arXiv 2602.07223)."""

logger = logging.getLogger("vllm.specattn")


def is_ours(vllm_config: VllmConfig) -> bool:
    """Whether an engine was asked to use our backend."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME


def is_ours_in_part(vllm_config: VllmConfig) -> bool:
    """Whether our backend was asked for in some kinds of layers only, which it is not made for."""
    per_kind = getattr(vllm_config.attention_config, "backend_per_kind", None) or {}
    names = {backend.name for backend in per_kind.values() if backend is not None}
    return BACKEND_NAME in names or (bool(names) and is_ours(vllm_config))


def _resolve(path: str) -> Any:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(path)


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


def load_backend_member(name: str):
    """Unpickles our enum member in a process whose plugins have not loaded yet."""
    register_backend()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name]


def register_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return
    member = AttentionBackendEnum.register(BACKEND_NAME, BACKEND_PATH)
    member.__reduce_ex__ = lambda protocol: (load_backend_member, (BACKEND_NAME,))


def choose_speculator() -> None:
    from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as upstream

    stock = upstream.StandaloneARSpeculator
    if getattr(stock, _MARK, False):
        return

    def build(vllm_config: VllmConfig, device: torch.device):
        if not is_ours(vllm_config):
            return stock(vllm_config, device)
        from specattn_vllm.options import SpecAttnOptions

        options = SpecAttnOptions.from_vllm(vllm_config)
        path = SKETCH_SPECULATOR_PATH if options.drafts_by_sketch else options.kind.speculator
        return _resolve(path)(vllm_config, device)

    setattr(build, _MARK, True)
    build.stock = stock
    upstream.StandaloneARSpeculator = build


def stock_speculator() -> type:
    """Upstream's class, whether or not its name has been taken over in this process."""
    from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as upstream

    return getattr(upstream.StandaloneARSpeculator, "stock", upstream.StandaloneARSpeculator)


def missing_hooks() -> list[str]:
    """What the speculator overrides and this vLLM does not have, as 'method' or 'method(argument)'."""
    stock, missing = stock_speculator(), []
    for method, argument in SPECULATOR_HOOKS.items():
        function = getattr(stock, method, None)
        if function is None:
            missing.append(method)
        elif argument is not None and argument not in inspect.signature(function).parameters:
            missing.append(f"{method}({argument})")
    return missing


def allow_on_cpu() -> None:
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if not current_platform.is_cpu() or getattr(platform.get_attn_backend_cls, _MARK, False):
        return
    original = platform.get_attn_backend_cls.__func__

    @functools.wraps(original)
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if selected_backend is None or selected_backend.name != BACKEND_NAME:
            return original(cls, selected_backend, attn_selector_config, num_heads)
        # The check that CudaPlatform makes for every backend; CPU has no device capability to check.
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"--attention-backend specattn cannot serve this model: {', '.join(reasons)}")
        return selected_backend.get_path()

    setattr(get_attn_backend_cls, _MARK, True)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def prepare_cpu_worker() -> None:
    """Called by the metadata builder: in a worker that uses the backend, before it samples."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.sample.ops import topk_topp_sampler

        from specattn_vllm.cpu_runner.interpreter import accept_integer_masks, compute_log1p, leave_out_needless_work

        topk_topp_sampler.HAS_TRITON = False
        accept_integer_masks()
        compute_log1p()
        leave_out_needless_work()


def add_cli_aliases() -> None:
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def add_cli_args(parser):
        parser = original(parser)
        for action in list(parser._actions):
            for flag in [f for f in action.option_strings if f in _ALIASES]:
                alias = _ALIASES[flag]
                if alias not in parser._option_string_actions:
                    action.option_strings.append(alias)
                    parser._option_string_actions[alias] = action
        return parser

    setattr(add_cli_args, _MARK, True)
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def check_engine_config() -> None:
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def create_engine_config(self, *args: Any, **kwargs: Any) -> VllmConfig:
        complete_speculation(self)
        vllm_config = original(self, *args, **kwargs)
        _resolve(CHECK_PATH)(vllm_config)
        return vllm_config

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config


def complete_speculation(engine_args: Any) -> None:
    """Fill in what our backend needs not be told: that a target that drafts for itself is its own draft model, and how
    many tokens are drafted."""
    backend = engine_args.attention_backend or getattr(engine_args.attention_config, "backend", None)
    if str(getattr(backend, "name", backend)).upper() != BACKEND_NAME:
        return
    from specattn_vllm.options import SpecAttnOptions

    options = SpecAttnOptions.from_additional(engine_args.additional_config)
    given = {key.replace("-", "_") for key in engine_args.speculative_config or {}}
    has_model = engine_args.spec_model is not None or "model" in given
    if options.drafts_for_itself and not has_model:
        engine_args.spec_model, has_model = engine_args.model, True
        if engine_args.spec_method is None and "method" not in given:
            # vLLM would guess from the model's name.
            engine_args.spec_method = "draft_model"
    if has_model and engine_args.spec_tokens is None and "num_speculative_tokens" not in given:
        engine_args.spec_tokens = SELF_DRAFT_LENGTH if options.drafts_for_itself else DEFAULT_DRAFT_LENGTH
        logger.info("specattn: drafting %d tokens a round (--num-speculative-tokens)", engine_args.spec_tokens)


def check_request() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    original = SamplingParams._verify_args
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def verify_args(self) -> None:
        original(self)
        if reason := problem(self.extra_args):
            raise VLLMValidationError(reason, parameter="extra_args")

    setattr(verify_args, _MARK, True)
    SamplingParams._verify_args = verify_args


def attach_to_runner() -> None:
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    except ImportError:
        return  # runner V2 cannot be imported where Triton does not work, and is refused there by name

    original = GPUModelRunner.load_model
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_ours(self.vllm_config):
            _resolve(ATTACH_PATH)(self)

    setattr(load_model, _MARK, True)
    GPUModelRunner.load_model = load_model


def capture_twice(model: Any, target: Any) -> None:
    """Have vLLM's full graphs of `model` captured once with target.captured true and once with it false, and replayed
    as target.chooses says. vLLM makes a manager of graphs after the model is loaded, and one to profile before that."""
    model.specattn_target = target
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    capture, run = ModelCudaGraphManager.capture, ModelCudaGraphManager.run_fullgraph
    if getattr(capture, _MARK, False):
        return

    @functools.wraps(capture)
    def capture_both(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self.specattn_target = target = getattr(model, "specattn_target", None)
        if target is None:
            return capture(self, model, *args, **kwargs)
        with _captured(target, True):
            capture(self, model, *args, **kwargs)
        samples = self._capture_mem_samples
        before = list(samples or ())
        graphs, wanted = self.graphs, self._capture_descs
        self.graphs = self.specattn_dense_graphs = {}
        self._capture_descs = {mode: descs for mode, descs in wanted.items() if mode.name == "FULL"}
        try:
            with _captured(target, False):
                capture(self, model, *args, **kwargs)
        finally:
            self.graphs, self._capture_descs = graphs, wanted
        if samples is not None:
            # vLLM reckons with a graph for each batch size, which takes a MiB at least: its memory is that of both.
            pairs = zip(before, samples[len(before) :], strict=True)
            samples[:] = [sum(pair) if n == 0 else sum(max(x, 1 << 20) for x in pair) for n, pair in enumerate(pairs)]

    @functools.wraps(run)
    def run_fullgraph(self, desc: Any) -> Any:
        target = getattr(self, "specattn_target", None)
        if target is None or target.chooses:
            return run(self, desc)
        graphs, self.graphs = self.graphs, self.specattn_dense_graphs
        try:
            return run(self, desc)
        finally:
            self.graphs = graphs

    setattr(capture_both, _MARK, True)
    ModelCudaGraphManager.capture, ModelCudaGraphManager.run_fullgraph = capture_both, run_fullgraph


@contextmanager
def _captured(target: Any, chooses: bool) -> Iterator[None]:
    target.captured = chooses
    try:
        yield
    finally:
        target.captured = None


def count_rounds(runner: Any, seen: Callable[[Any, Any], None]) -> None:
    """Call seen(input batch, sampled tokens by row) for each round of a drafter, if there is one; not for dummies."""
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
    """Keep target.dummy true while vLLM runs a step for warming up."""
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
    """Whether a request is one of those by which vLLM warms its kernels up."""
    return request.req_id.startswith(("_warmup_", "_v2_mixed_warmup"))


def watch_new_requests(model_state: Any, seen: Callable[[int, Any], None]) -> None:
    """Call seen(slot, request data) for each request that the worker takes up, a resumed one included."""
    original = getattr(model_state.add_request, "original", model_state.add_request)

    @functools.wraps(original)
    def add_request(req_index, new_req_data):
        seen(req_index, new_req_data)
        return original(req_index, new_req_data)

    add_request.original = original
    model_state.add_request = add_request


def add_worker_method() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, "specattn_stats"):
        return

    def specattn_stats(self) -> dict[str, int] | None:
        """Counts of this worker since start-up; None without our backend. For `collective_rpc`."""
        counters = getattr(self.model_runner, "specattn_counters", None)
        counters = getattr(getattr(self.model_runner, "speculator", None), "counters", counters)
        chooser = getattr(self.model_runner, "specattn_chooser", None)
        if chooser is not None:
            chooser.counts.fold()
            counters = chooser.counts.counters
        return vars(counters.read()) if counters is not None else None

    def specattn_audit(self) -> dict[str, dict[str, float]] | None:
        """What this worker's audits found since start-up, by layer; None without an audit. For `collective_rpc`."""
        audit = getattr(getattr(self.model_runner, "speculator", None), "audit", None)
        return audit.read().by_layer() if audit is not None else None

    WorkerBase.specattn_stats = specattn_stats
    WorkerBase.specattn_audit = specattn_audit

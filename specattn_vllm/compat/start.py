"""Patches of every vLLM process: the backend's name, the command line, and checks of options and requests."""

from __future__ import annotations

import logging
import sys
from importlib import import_module, util
from typing import Any

from specattn_vllm.compat.names import BACKEND_NAME, is_ours, resolve
from specattn_vllm.compat.patching import patched
from specattn_vllm.request import asks_for_exactness, problem

_ALIASES = {"--spec-model": "--speculative-model", "--spec-tokens": "--num-speculative-tokens"}

logger = logging.getLogger("vllm.specattn")


def load_backend_member(name: str):
    """Unpickles our enum member in a process whose plugins have not loaded yet."""
    register_backend()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name]


def register_backend() -> None:
    """`AttentionBackendEnum` members that are registered at run time pickle by value, and a spawned worker unpickles
    its config before plugins load: "'...' is not a valid AttentionBackendEnum". Remove when registered members pickle
    by name, or workers load plugins first."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        member = AttentionBackendEnum.register(BACKEND_NAME, "specattn_vllm.backend.backend.SpecAttnBackend")
        member.__reduce_ex__ = lambda protocol: (load_backend_member, (BACKEND_NAME,))


def select_backend() -> None:
    """Layers with a sliding window get the backend that vLLM would choose if none were named; `backend_per_kind` can
    name one for them, and has no word for vLLM's own choice. Remove when a backend may decline layers. And
    `CpuPlatform` replaces every backend by CPU_ATTN without an error. Remove when it accepts registered backends."""
    from vllm.platforms import current_platform

    @patched(type(current_platform), "get_attn_backend_cls")
    def get_attn_backend_cls(original, cls, selected_backend, attn_selector_config, num_heads=None):
        ours = selected_backend is not None and selected_backend.name == BACKEND_NAME
        if ours and attn_selector_config.has_sliding_window:
            selected_backend = None
        elif ours and current_platform.is_cpu():
            # The same check as in CudaPlatform, but a CPU has no device capability to check.
            backend = selected_backend.get_class()
            reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
            if reasons:
                raise ValueError(f"--attention-backend specattn cannot serve this model: {', '.join(reasons)}")
            return selected_backend.get_path()
        return original(cls, selected_backend, attn_selector_config, num_heads)


def add_cli_aliases() -> None:
    """vLLM's flags are `--spec-model` and `--spec-tokens`. This adds aliases that users look for. Remove if vLLM adds
    them."""
    from vllm.engine.arg_utils import EngineArgs

    @patched(EngineArgs, "add_cli_args")
    def add_cli_args(original, parser):
        parser = original(parser)
        known = parser._option_string_actions
        for flag, alias in _ALIASES.items():
            if flag in known and alias not in known:
                known[flag].option_strings.append(alias)
                known[alias] = known[flag]
        return parser


def check_engine_config() -> None:
    """Start-up checks need the finished config in the process of the user's command, where the user sees the error.
    Remove when vLLM has a hook there."""
    from vllm.engine.arg_utils import EngineArgs

    @patched(EngineArgs, "create_engine_config")
    def create_engine_config(original, self, *args: Any, **kwargs: Any):
        complete_speculation(self)
        vllm_config = original(self, *args, **kwargs)
        resolve("specattn_vllm.checks.check")(vllm_config)
        if is_ours(vllm_config) and not self.disable_log_stats:
            # This must happen before any other process of the engine is started.
            resolve("specattn_vllm.metrics.snapshot.make_folder")()
        return vllm_config


def complete_speculation(engine_args: Any) -> None:
    """Fill in two settings that users of our backend may omit: the number of draft tokens, and the draft model of a
    method that brings its own. vLLM refuses the first, and a target that drafts for itself would have to be named
    twice. Remove if vLLM gets defaults that a backend can set."""
    backend = engine_args.attention_backend or getattr(engine_args.attention_config, "backend", None)
    if str(getattr(backend, "name", backend)).upper() != BACKEND_NAME:
        return
    from specattn_vllm.options import SpecAttnOptions

    options = SpecAttnOptions.from_additional(engine_args.additional_config)
    given = {key.replace("-", "_") for key in engine_args.speculative_config or {}}
    has_model = engine_args.spec_model is not None or "model" in given
    own = options.draft_model(engine_args.model, None)
    if own is not None and not has_model:
        engine_args.spec_model, has_model = own, True
        if engine_args.spec_method is None and "method" not in given:
            # Otherwise vLLM would guess the method from the model's name.
            engine_args.spec_method = "draft_model"
    if has_model and engine_args.spec_tokens is None and "num_speculative_tokens" not in given:
        engine_args.spec_tokens = options.kind.draft_length
        logger.info("specattn: drafting %d tokens per round (--num-speculative-tokens)", engine_args.spec_tokens)


def check_request() -> None:
    """A request's extra arguments are validated when `SamplingParams` is made, so that a wrong value is the client's
    error (HTTP 400) and not the engine's. Remove when plugins may validate requests."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    @patched(SamplingParams, "_verify_args")
    def verify_args(original, self) -> None:
        original(self)
        if reason := problem(self.extra_args):
            raise VLLMValidationError(reason, parameter="extra_args")
        if asks_for_exactness(self):
            # Cached blocks may hold entries from pruned steps of another request. This also matters after a preemption.
            self.skip_reading_prefix_cache = True


def serve_metrics() -> None:
    """`/metrics` serves the registry of the process. With several API servers it serves a registry that is made for
    each request, so nothing can be added to it. Every server calls `get_prometheus_registry` first; with several
    servers, `metrics/collect.py` wraps `collect` of prometheus_client's `MultiProcessCollector` too. Remove when
    plugins have a hook for metrics."""
    from vllm.v1.metrics import prometheus

    @patched(prometheus, "get_prometheus_registry")
    def get_prometheus_registry(original):
        registry = original()
        resolve("specattn_vllm.metrics.collect.add_to")(registry)
        return registry

    # If this module is already imported, it holds its own reference to the function.
    if (server := sys.modules.get("vllm.entrypoints.serve.instrumentator.metrics")) is not None:
        server.get_prometheus_registry = prometheus.get_prometheus_registry


def serve_parser() -> Any:
    """The parser of `vllm serve`, which is in another module in each version."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for place in ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args"):
        if util.find_spec(place) is not None:
            return import_module(place).make_arg_parser(FlexibleArgumentParser())
    raise ImportError("this vLLM has its `make_arg_parser` neither in entrypoints.launchers nor in entrypoints.common")

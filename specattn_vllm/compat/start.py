"""Patches of every vLLM process: the backend's name, the command line, and checks of options and requests."""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any

from specattn_vllm.compat.names import (
    BACKEND_NAME,
    BACKEND_PATH,
    CHECK_PATH,
    MARK,
    METRICS_FOLDER_PATH,
    METRICS_PATH,
    is_ours,
    resolve,
)
from specattn_vllm.request import asks_for_exactness, problem

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ALIASES = {"--spec-model": "--speculative-model", "--spec-tokens": "--num-speculative-tokens"}

logger = logging.getLogger("vllm.specattn")


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


def select_backend() -> None:
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if getattr(platform.get_attn_backend_cls, MARK, False):
        return
    original = platform.get_attn_backend_cls.__func__

    @functools.wraps(original)
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if selected_backend is None or selected_backend.name != BACKEND_NAME:
            return original(cls, selected_backend, attn_selector_config, num_heads)
        if attn_selector_config.has_sliding_window:
            return original(cls, None, attn_selector_config, num_heads)
        if not current_platform.is_cpu():
            return original(cls, selected_backend, attn_selector_config, num_heads)
        # The same check as in CudaPlatform, but a CPU has no device capability to check.
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"--attention-backend specattn cannot serve this model: {', '.join(reasons)}")
        return selected_backend.get_path()

    setattr(get_attn_backend_cls, MARK, True)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def add_cli_aliases() -> None:
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args
    if getattr(original, MARK, False):
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

    setattr(add_cli_args, MARK, True)
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def check_engine_config() -> None:
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def create_engine_config(self, *args: Any, **kwargs: Any) -> VllmConfig:
        complete_speculation(self)
        vllm_config = original(self, *args, **kwargs)
        resolve(CHECK_PATH)(vllm_config)
        if is_ours(vllm_config) and not self.disable_log_stats:
            # This must happen before any other process of the engine is started.
            resolve(METRICS_FOLDER_PATH)()
        return vllm_config

    setattr(create_engine_config, MARK, True)
    EngineArgs.create_engine_config = create_engine_config


def complete_speculation(engine_args: Any) -> None:
    """Fill in two settings that users of our backend may omit: the number of draft tokens, and the draft model of a
    method that brings its own."""
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
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    original = SamplingParams._verify_args
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def verify_args(self) -> None:
        original(self)
        if reason := problem(self.extra_args):
            raise VLLMValidationError(reason, parameter="extra_args")
        if asks_for_exactness(self):
            # Cached blocks may hold entries from pruned steps of another request. This also matters after a preemption.
            self.skip_reading_prefix_cache = True

    setattr(verify_args, MARK, True)
    SamplingParams._verify_args = verify_args


def serve_metrics() -> None:
    from vllm.v1.metrics import prometheus

    original = prometheus.get_prometheus_registry
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def get_prometheus_registry():
        registry = original()
        resolve(METRICS_PATH)(registry)
        return registry

    setattr(get_prometheus_registry, MARK, True)
    prometheus.get_prometheus_registry = get_prometheus_registry
    # If this module is already imported, it holds its own reference to the function.
    if (server := sys.modules.get("vllm.entrypoints.serve.instrumentator.metrics")) is not None:
        server.get_prometheus_registry = get_prometheus_registry


def serve_parser() -> Any:
    """The parser of `vllm serve`, which is in another module in each version."""
    from importlib import import_module, util

    from vllm.utils.argparse_utils import FlexibleArgumentParser

    places = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args")
    place = next((name for name in places if util.find_spec(name) is not None), None)
    if place is None:
        raise ImportError(f"this vLLM has its `make_arg_parser` in none of {', '.join(places)}")
    return import_module(place).make_arg_parser(FlexibleArgumentParser())

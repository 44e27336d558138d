"""Patches of every process: the command line, and the CPU platform's choice of backends."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
import torch
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

CLASS = "specattn_vllm.backend.backend.SpecAttnBackend"


# The command line


def engine_args(*arguments: str) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args([*arguments]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--spec-model", "some/draft", "--spec-tokens", "4"],
        ["--speculative-model", "some/draft", "--num-speculative-tokens", "4"],
        ["--speculative-model=some/draft", "--num-speculative-tokens=4"],
        ["--speculative_model", "some/draft", "--num_speculative_tokens", "4"],
        ["--speculative_model=some/draft", "--num_speculative_tokens=4"],
    ],
    ids=" ".join,
)
def test_the_aliases_are_vllm_s_own_flags(arguments):
    args = engine_args(*arguments)
    assert (args.spec_model, args.spec_tokens) == ("some/draft", 4)


def test_an_alias_checks_its_value_as_the_flag_does(capsys):
    with pytest.raises(SystemExit):
        engine_args("--num-speculative-tokens", "many")
    assert "many" in capsys.readouterr().err


def test_each_alias_is_there_once():
    for add_cli_args in (EngineArgs.add_cli_args, AsyncEngineArgs.add_cli_args):
        parser = add_cli_args(FlexibleArgumentParser())
        flags = [flag for action in parser._actions for flag in action.option_strings]
        for flag in ("--spec-model", "--speculative-model", "--spec-tokens", "--num-speculative-tokens"):
            assert flags.count(flag) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--additional-config", '{"specattn": {"top_p": 0.5, "dense_layers": [1]}}'],
        ["--additional-config.specattn", '{"top_p": 0.5, "dense_layers": [1]}'],
        ["--additional-config.specattn.top_p", "0.5", "--additional-config.specattn.dense_layers", "[1]"],
    ],
    ids=["object", "dotted object", "dotted options"],
)
def test_options_reach_the_engine_arguments(arguments):
    assert engine_args(*arguments).additional_config == {"specattn": {"top_p": 0.5, "dense_layers": [1]}}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--attention-backend", "specattn"],
        ["--attention-config", '{"backend": "specattn"}'],
        ["--attention-config.backend", "specattn"],
    ],
    ids=["flag", "JSON", "dotted"],
)
def test_each_way_of_naming_the_backend_on_the_command_line(arguments):
    given = engine_args(*arguments)
    backend = given.attention_backend or given.attention_config.backend
    assert getattr(backend, "name", backend).upper() == "SPECATTN"


@pytest.mark.parametrize("name", ["specattn", "SPECATTN", "SpecAttn"])
def test_the_name_is_understood_in_any_case(name, ours):
    assert AttentionConfig(backend=name).backend is ours
    assert engine_args("--attention-backend", name).attention_backend in (name, ours)


# The CPU platform


on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="other platforms honour registered backends")


def selector(**changes) -> AttentionSelectorConfig:
    base = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": 16}
    return AttentionSelectorConfig(**base | changes)


@on_cpu
def test_the_cpu_platform_honours_our_backend(ours):
    assert current_platform.get_attn_backend_cls(ours, selector()) == CLASS
    assert current_platform.get_attn_backend_cls(ours, selector(), num_heads=8) == CLASS
    assert type(current_platform).get_attn_backend_cls(ours, selector()) == CLASS


@on_cpu
@pytest.mark.parametrize("backend", [None, "CPU_ATTN", "TRITON_ATTN"])
def test_the_cpu_platform_answers_as_before_for_other_backends(backend):
    platform = type(current_platform)
    original = platform.get_attn_backend_cls.__func__.__wrapped__
    member = AttentionBackendEnum[backend] if backend else None
    assert current_platform.get_attn_backend_cls(member, selector()) == original(platform, member, selector())
    assert current_platform.get_attn_backend_cls(member, selector()) == AttentionBackendEnum.CPU_ATTN.get_path()


@on_cpu
def test_a_layer_with_a_window_gets_what_vllm_would_choose(ours):
    found = current_platform.get_attn_backend_cls(ours, selector(has_sliding_window=True))
    assert found == AttentionBackendEnum.CPU_ATTN.get_path()


@on_cpu
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 32}, "head_size not supported"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        ({"block_size": 8}, "block_size not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
    ],
)
def test_the_cpu_platform_refuses_what_the_backend_does_not_support(ours, changes, reason):
    with pytest.raises(ValueError, match=f"--attention-backend specattn cannot serve this model: .*{reason}"):
        current_platform.get_attn_backend_cls(ours, selector(**changes))

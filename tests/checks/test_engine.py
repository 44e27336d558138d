"""What of vLLM's engine cannot be served, each with its remedy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from specattn_vllm import checks, compat

# On other platforms vLLM itself refuses more processes than there are devices.
cpu_only = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM counts devices on other platforms")


def test_another_quantised_cache_is_refused(reasons):
    assert reasons(kv_cache_dtype="fp8_e5m2") == [
        "kv_cache_dtype = 'fp8_e5m2': the cache must have the model's dtype, float32, or that of 8-bit floats, fp8 "
        "(e4m3, one scale for a layer); use 'auto' or 'fp8'",
    ]


@pytest.mark.parametrize("method", ["sketch", "dense", "specattn", "sts"])
def test_an_fp8_cache_is_served(configure, method):
    configure(kv_cache_dtype="fp8", options={"method": method})


def test_layers_with_a_cache_of_their_own_are_refused(reasons):
    assert reasons(kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=["0"]) == [
        "kv_cache_dtype_skip_layers: all layers that select need caches of one type; remove it"
    ]


def scheme(strategy: str) -> SimpleNamespace:
    """Of a checkpoint of compressed-tensors with an fp8 KV cache."""
    return SimpleNamespace(quantization_config={"kv_cache_scheme": {"type": "float", "strategy": strategy}})


def test_scales_for_heads_are_refused():
    config = engine(cache={"cache_dtype": "fp8"})
    config.model_config.hf_config = scheme("attn_head")
    (reason,) = checks._engine(config)
    assert reason.startswith("the checkpoint's kv_cache_scheme has a scale for each head") and "use a check" in reason
    config.model_config.hf_config = scheme("tensor")
    assert not list(checks._engine(config))


@pytest.mark.parametrize(("asked", "found"), [("auto", "fp8"), ("bfloat16", "bfloat16"), ("fp8_e4m3", "fp8_e4m3")])
def test_a_checkpoint_may_say_that_its_cache_is_fp8(asked, found):
    """vLLM hears of it when it makes the first layer: what is checked and allocated before must know."""
    config = engine(cache={"cache_dtype": asked})
    checks._take_what_the_checkpoint_says(config)
    assert config.cache_config.cache_dtype == asked
    config.model_config.hf_config = scheme("tensor")
    checks._take_what_the_checkpoint_says(config)
    assert config.cache_config.cache_dtype == found


def test_fp8_on_a_gpu_without_such_numbers_is_refused(monkeypatch):
    monkeypatch.setattr(checks, "_before_fp8", lambda: True)
    (reason,) = checks._engine(engine(cache={"cache_dtype": "fp8"}))
    assert reason == "kv_cache_dtype = 'fp8': GPUs older than Ada and Hopper have no such numbers; use 'auto'"


@cpu_only
def test_two_reasons_read_as_the_page_of_refusals_has_them(reasons):
    page = (Path(__file__).parents[2] / "docs" / "refusals.md").read_text()
    lines = [
        line.strip()
        for line in page.split("    --attention-backend specattn cannot serve this:\n")[1].split("\n\n")[0].splitlines()
    ]
    told = reasons(target="narrow", draft=None, options={"method": "sketch"}, pipeline_parallel_size=2)
    assert told == lines and len(lines) == 2


@cpu_only
def test_pipeline_parallelism_is_refused(reasons):
    assert reasons(pipeline_parallel_size=2) == [
        "pipeline_parallel_size = 2: the draft runs on the last rank only; use 1",
    ]


@cpu_only
def test_context_parallelism_is_refused(reasons):
    arguments = {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
    assert reasons(**arguments) == ["decode_context_parallel_size = 2: use 1"]


@pytest.mark.parametrize("modules", [None, ["q_proj", "lm_head"]])
def test_lora_on_the_head_is_refused_where_drafts_are_verified(reasons, modules):
    assert reasons(enable_lora=True, lora_target_modules=modules) == [
        "LoRA on lm_head with speculation: runner V2 has one adapter for each request there, not for each row of a "
        "verification; name the modules of your adapters without it (--lora-target-modules q_proj k_proj ...), or "
        "serve without speculation"
    ]


@pytest.mark.parametrize("method", ["sketch", "dense", "specattn", "sts"])
def test_lora_on_other_modules_is_served(configure, method):
    configure(enable_lora=True, lora_target_modules=["q_proj"], options={"method": method})


@pytest.mark.parametrize("method", ["sketch", "dense"])
def test_lora_is_served_without_speculation(configure, method):
    configure(enable_lora=True, draft=None, options={"method": method})


@pytest.mark.parametrize("method", ["vegas", "streamingllm"])
def test_lora_is_refused_with_a_target_that_drafts_for_itself(reasons, method):
    given = {"options": {"method": method}, "lora_target_modules": ["q_proj"], "enable_lora": True}
    assert reasons(draft="target", **given) == [
        f"LoRA with method = {method!r}: vLLM chooses adapters for the rows of a verification, not for those of the "
        "target's own drafts; serve merged weights, or set method='sketch'"
    ]


OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
# Stands for a module of the user's.
MODULE = "vllm.distributed.kv_transfer.kv_connector.v1.example_connector"
FILES = SimpleNamespace(kv_connector="ExampleConnector", kv_connector_extra_config={}, kv_connector_module_path=None)


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"kv_connector": "NixlConnector"}, "NixlConnector"),
        (
            {"kv_connector": "ExampleConnector", "kv_connector_module_path": MODULE},
            f"ExampleConnector of {MODULE}",
        ),
        (
            {"kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec"}},
            "OffloadingConnector of TieringOffloadingSpec",
        ),
        ({"kv_connector_extra_config": {"spec_module_path": "mine.specs"}}, "OffloadingConnector of mine.specs"),
    ],
)
def test_kv_connectors_that_were_not_tried_are_refused(reasons, changes, which, monkeypatch):
    monkeypatch.setattr(checks, "_on_cpu", lambda: False)
    (reason,) = reasons(kv_transfer_config=OFFLOADING | changes)
    assert reason.startswith(f"KV connector {which!r}: the plugin was tried beside vLLM's ")
    assert all(name in reason for name in compat.CONNECTORS)
    assert reason.endswith("with --kv-offloading-backend native, or leave --kv-transfer-config out")


@pytest.mark.parametrize("method", ["sketch", "dense", "specattn", "sts"])
@pytest.mark.parametrize("name", compat.CONNECTORS)
def test_other_kv_connectors_are_served(configure, name, method, monkeypatch):
    monkeypatch.setattr(checks, "_on_cpu", lambda: False)
    configure(kv_transfer_config={"kv_connector": name, "kv_role": "kv_both"}, options={"method": method})


@cpu_only
@pytest.mark.parametrize("name", ["OffloadingConnector", "NixlConnector"])
def test_connectors_on_a_cpu_are_refused(reasons, name):
    """vLLM's offloading says so too, once a worker has loaded the model."""
    assert reasons(kv_transfer_config=OFFLOADING | {"kv_connector": name}) == [
        f"KV connector {name!r} on a CPU: vLLM's offloading copies what is in a GPU's memory; leave "
        "--kv-transfer-config and --kv-offloading-size out"
    ]


@pytest.mark.parametrize(("ranks", "adapters", "told"), [(2, None, True), (1, object(), True), (1, None, False)])
def test_files_that_ranks_or_adapters_would_share_are_refused(ranks, adapters, told):
    """They are named after tokens."""
    config = engine({"tensor_parallel_size": ranks}, kv_transfer_config=FILES, lora_config=adapters)
    found = list(checks._connector(config, "auto"))
    assert [
        reason.startswith("KV connector 'ExampleConnector' with tensor parallelism or LoRA") for reason in found
    ] == ([True] * told)


def test_a_kv_connector_beside_a_hybrid_or_xformers_is_refused():
    model = SimpleNamespace(is_hybrid=True)
    config = engine(model_config=model, kv_transfer_config=FILES)
    assert list(checks._connector(config, "xformers")) == [
        "a KV connector beside layers of linear attention or Mamba was not tried; leave --kv-transfer-config and "
        "--kv-offloading-size out",
        "a KV connector with executor 'xformers': it reads one layout of the cache, and vLLM's offloading takes "
        "another; use 'auto' or 'triton'",
    ]


def test_sleep_mode_is_refused():
    config = engine(
        model_config=SimpleNamespace(dtype="torch.bfloat16", enable_sleep_mode=True, hf_config=SimpleNamespace())
    )
    (reason,) = checks._engine(config)
    assert reason.startswith("--enable-sleep-mode: ") and reason.endswith("leave it out")


@pytest.mark.parametrize(("ranks", "on_cpu", "told"), [(2, True, True), (1, True, False), (2, False, False)])
def test_experts_spread_over_ranks_are_refused_on_a_cpu(monkeypatch, ranks, on_cpu, told):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: on_cpu)
    given = {"enable_expert_parallel": True, "tensor_parallel_size": ranks}
    found = list(checks._engine(engine(parallel=given)))
    assert [reason.startswith("--enable-expert-parallel on a CPU: vLLM 0.32") for reason in found] == [True] * told


def test_fast_prefill_is_refused(reasons):
    assert reasons(kv_sharing_fast_prefill=True) == ["kv_sharing_fast_prefill: remove it"]


@pytest.mark.parametrize(
    ("on_cpu", "remedy"),
    [(True, 'on CPU, run  eval "$(specattn cpu-env)"  first'), (False, "unset VLLM_USE_V2_MODEL_RUNNER")],
)
def test_runner_v1_is_refused_with_the_remedy_for_the_platform(monkeypatch, on_cpu, remedy):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: on_cpu)
    (reason,) = checks._engine(engine(use_v2_model_runner=False))
    assert reason.startswith(f"model runner V1: only V2 is supported; {remedy}, or turn off")


def test_runner_v1_is_noticed_where_vllm_chooses_it(reasons, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    (reason,) = reasons()
    assert reason.startswith("model runner V1: only V2 is supported")


def engine(parallel=None, cache=None, **changes):
    """What `_engine` looks at, with everything in order but the changes."""
    base = {
        "use_v2_model_runner": True,
        "model_config": SimpleNamespace(
            dtype="torch.bfloat16", enable_sleep_mode=False, hf_config=SimpleNamespace(), is_hybrid=False
        ),
        "parallel_config": SimpleNamespace(
            **{"pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "use_ubatching": False}
            | {"enable_expert_parallel": False, "tensor_parallel_size": 1, "data_parallel_size": 1}
            | (parallel or {})
        ),
        "cache_config": SimpleNamespace(
            **{"cache_dtype": "auto", "kv_cache_dtype_skip_layers": [], "kv_sharing_fast_prefill": False}
            | (cache or {})
        ),
        "lora_config": None,
        "kv_transfer_config": None,
    }
    return SimpleNamespace(**base | changes)


def test_an_engine_in_order_has_no_reasons():
    assert list(checks._engine(engine())) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [("pipeline_parallel_size", 4), ("decode_context_parallel_size", 2), ("prefill_context_parallel_size", 2)],
)
def test_each_kind_of_parallelism_is_named(setting, value):
    # Without vLLM's own checks, which depend on the devices there are.
    (reason,) = checks._engine(engine(parallel={setting: value}))
    assert reason.startswith(f"{setting} = {value}: ")
    assert reason.endswith("use 1")


@pytest.mark.parametrize("dtype", ["fp8_e5m2", "fp8_per_token_head", "int8_per_token_head", "nvfp4", "float16"])
def test_each_quantised_cache_is_named(dtype):
    (reason,) = checks._engine(engine(cache={"cache_dtype": dtype}))
    assert reason.startswith(f"kv_cache_dtype = {dtype!r}: ")


def test_microbatches_are_named():
    (reason,) = checks._engine(engine(parallel={"use_ubatching": True}))
    assert reason.startswith("microbatches (enable_dbo, ubatch_size)")


def test_the_cache_may_name_the_models_own_dtype():
    for dtype in ("bfloat16", "fp8", "fp8_e4m3"):
        assert list(checks._engine(engine(cache={"cache_dtype": dtype}))) == []

"""What speculation cannot be served, each with its remedy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from specattn_vllm import checks
from specattn_vllm.options import SpecAttnOptions

# On other platforms vLLM itself refuses more processes than there are devices.
cpu_only = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM counts devices on other platforms")

SELF = pytest.mark.parametrize("method", ["vegas", "streamingllm"])


def test_the_method_needs_a_draft(reasons):
    (reason,) = reasons(draft=None)
    assert reason.startswith("method = 'specattn' without a draft model: give --speculative-model DRAFT")
    assert "--num-speculative-tokens K" in reason
    assert "method='dense'" in reason


def test_speculation_without_a_draft_model_is_refused(reasons):
    spec = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    (reason,) = reasons(draft=None, spec=spec)
    assert reason.startswith("speculative method 'ngram': a separate draft model is needed (--spec-method draft_model)")
    # What happens to people whose folder is called 'my-eagle-pair'.
    assert "renamed" in reason


@SELF
def test_a_draft_model_beside_a_target_that_drafts_for_itself_is_refused(reasons, models, method):
    assert reasons(options={"method": method}) == [
        f"method = {method!r} with --speculative-model {models['draft']}: the target drafts for itself, and no draft "
        "model would be loaded; leave --speculative-model out, or set method='specattn'",
    ]


@SELF
def test_experts_that_move_are_refused_for_a_target_that_drafts_for_itself(method):
    config = speculation(draft_model_config=SimpleNamespace(model="target"))
    config.model_config = SimpleNamespace(model="target")
    assert list(checks._speculation(config, SpecAttnOptions(method=method))) == []
    config.parallel_config.enable_eplb = True
    (reason,) = checks._speculation(config, SpecAttnOptions(method=method))
    assert reason == f"method = {method!r} with enable_eplb: one model would be registered twice; turn EPLB off"
    assert list(checks._speculation(config, SpecAttnOptions(method="dense"))) == []


@cpu_only
def test_draft_and_target_need_the_same_tensor_parallelism(reasons):
    assert reasons(tensor_parallel_size=2, spec={"draft_tensor_parallel_size": 1}) == [
        "draft_tensor_parallel_size = 1: must equal the target's, 2",
    ]


def speculation(**changes):
    """What `_speculation` looks at, with everything in order but the changes to its speculative part."""
    base = {
        "uses_draft_model": lambda: True,
        "method": "draft_model",
        "draft_sample_method": "greedy",
        "parallel_drafting": False,
        "enable_adaptive_verification": False,
        "kv_cache_dtype": None,
        "draft_parallel_config": SimpleNamespace(tensor_parallel_size=4),
    }
    return SimpleNamespace(
        speculative_config=SimpleNamespace(**base | changes),
        parallel_config=SimpleNamespace(tensor_parallel_size=4, enable_eplb=False),
        cache_config=SimpleNamespace(cache_dtype="bfloat16"),
    )


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16"])
def test_speculation_in_order_has_no_reasons(dtype):
    assert list(checks._speculation(speculation(kv_cache_dtype=dtype), SpecAttnOptions())) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parallel_drafting": True}, "parallel_drafting: selections need one draft step per token; turn it off"),
        ({"enable_adaptive_verification": True}, "enable_adaptive_verification: turn it off"),
        ({"kv_cache_dtype": "float16"}, "draft kv_cache_dtype = 'float16': draft and target must share one; remove it"),
        (
            {"draft_parallel_config": SimpleNamespace(tensor_parallel_size=2)},
            "draft_tensor_parallel_size = 2: must equal the target's, 4",
        ),
    ],
)
@pytest.mark.parametrize("method", ["specattn", "dense"])
def test_each_setting_of_speculation_is_named(changes, reason, method):
    assert list(checks._speculation(speculation(**changes), SpecAttnOptions(method=method))) == [reason]


def test_several_reasons_are_all_given(reasons):
    found = reasons(target="windowed-narrow", draft=None, enable_lora=True, kv_cache_dtype="fp8")
    assert [reason.split(":")[0] for reason in found] == [
        "kv_cache_dtype = 'fp8'",
        "LoRA",
        "target",
        "target",
        "method = 'specattn' without a draft model",
    ]


def test_probabilistic_drafts_are_refused_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setattr(checks, "_interpreted", lambda: True)
    (reason,) = checks._speculation(speculation(draft_sample_method="probabilistic"), SpecAttnOptions())
    assert "'probabilistic'" in reason and "use 'greedy'" in reason
    monkeypatch.setattr(checks, "_interpreted", lambda: False)
    assert list(checks._speculation(speculation(draft_sample_method="probabilistic"), SpecAttnOptions())) == []

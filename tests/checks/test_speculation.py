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
ANY = pytest.mark.parametrize("method", ["sketch", "dense"])
N_GRAMS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


def test_the_method_needs_a_draft(reasons):
    (reason,) = reasons(draft=None)
    assert reason.startswith("method = 'specattn' without a draft model: give --speculative-model DRAFT")
    assert "--num-speculative-tokens K" in reason
    assert "method='dense'" in reason


def test_speculation_without_a_draft_model_is_refused(reasons):
    (reason,) = reasons(draft=None, spec=N_GRAMS)
    assert reason.startswith("speculative method 'ngram': a separate draft model is needed (--spec-method draft_model)")
    # What happens to people whose folder is called 'my-eagle-pair'.
    assert "renamed" in reason


@pytest.mark.parametrize("method", ["sts", "vegas", "streamingllm"])
def test_methods_that_watch_a_draft_model_say_so(reasons, method):
    (reason,) = reasons(draft=None, spec=N_GRAMS, options={"method": method})
    assert f"is needed (--spec-method draft_model) for method = {method!r}; methods 'sketch' and 'dense'" in reason


@ANY
def test_any_drafter_goes_with_methods_that_ask_nothing_of_it(configure, method):
    assert configure(draft=None, spec=N_GRAMS, options={"method": method}).speculative_config.method == "ngram"


@ANY
def test_drafting_sparsely_asks_for_a_draft_model(reasons, method):
    (reason,) = reasons(draft=None, spec=N_GRAMS, options={"method": method, "sparse_draft": True})
    assert "is needed (--spec-method draft_model) for sparse_draft;" in reason


@ANY
def test_a_target_is_refused_once_where_vllm_names_it_as_the_draft_too(reasons, method):
    (reason,) = reasons(target="narrow", draft=None, spec=N_GRAMS, options={"method": method})
    assert reason.startswith("target: head size 32")


@ANY
def test_drafters_of_runner_v1_are_refused(reasons, method):
    spec = {"method": "custom_class", "model": "somewhere.Proposer", "num_speculative_tokens": 2}
    (reason,) = reasons(draft=None, spec=spec, options={"method": method})
    assert reason.startswith("model runner V1: only V2 is supported")


@ANY
def test_drafters_that_always_draft_at_once_are_accepted(method):
    config = speculation(method="dflash", uses_draft_model=lambda: False, parallel_drafting=True)
    assert told(config, method) == []


@SELF
def test_a_draft_model_beside_a_target_that_drafts_for_itself_is_refused(reasons, models, method):
    assert reasons(options={"method": method}) == [
        f"method = {method!r} with --speculative-model {models['draft']}: the target drafts for itself and "
        "loads no draft model; leave --speculative-model out, or set method='specattn'",
    ]


@SELF
def test_experts_that_move_are_refused_for_a_target_that_drafts_for_itself(method):
    config = speculation()
    config.speculative_config.draft_model_config = config.model_config
    assert told(config, method) == []
    config.parallel_config.enable_eplb = True
    (reason,) = told(config, method)
    assert reason == f"method = {method!r} with enable_eplb: one model would be registered twice; turn EPLB off"
    assert told(config, "dense") == []


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
        "draft_model_config": model("draft"),
    }
    return SimpleNamespace(
        speculative_config=SimpleNamespace(**base | changes),
        parallel_config=SimpleNamespace(tensor_parallel_size=4, enable_eplb=False),
        cache_config=SimpleNamespace(cache_dtype="bfloat16"),
        lora_config=None,
        model_config=model("target"),
    )


def model(name: str) -> SimpleNamespace:
    return SimpleNamespace(
        model=name,
        max_model_len=128,
        original_max_model_len=None,
        get_sliding_window=lambda: None,
        hf_text_config=None,
        hf_config=SimpleNamespace(),
        is_hybrid=False,
        dtype="bfloat16",
    )


def told(config, method: str) -> list[str]:
    """The reasons for which speculation is refused, in general and by a method."""
    return [*checks._speculation(config), *SpecAttnOptions.parse({"method": method}).refusals(config)]


@pytest.mark.parametrize(
    ("spec", "options", "named"),
    [
        (None, {"draft_ratio": 0.3}, "draft_ratio"),
        (None, {"sparse_draft": True}, "sparse_draft"),
        (None, {"method": "dense", "sparse_draft": True, "draft_ratio": 0.3}, "draft_ratio and sparse_draft"),
        ({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}, {"draft_ratio": 0.3}, "draft_ratio"),
    ],
)
def test_options_of_a_draft_model_that_is_not_there_are_refused(reasons, spec, options, named):
    assert reasons(draft=None, spec=spec, options={"method": "sketch"} | options) == [
        f"{named} without a draft model, whose steps alone they are about: leave it out, or give --speculative-model "
        "DRAFT"
    ]


@pytest.mark.parametrize("method", ["specattn", "sketch", "dense"])
def test_a_draft_with_fewer_positions_than_the_target_is_refused(reasons, configure, method):
    said = "give --max-model-len 64, or a draft model with more positions, another drafter, or none"
    assert reasons(draft="short", options={"method": method}) == [
        f"the draft model has 64 positions, and contexts may have 128 tokens: {said}"
    ]
    # vLLM 0.33 lowers the target's length by itself.
    cut = SimpleNamespace(max_model_len=64, original_max_model_len=128)
    assert list(checks._positions(cut, SimpleNamespace(max_model_len=64)))
    assert not list(checks._positions(cut, SimpleNamespace(max_model_len=128)))


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16"])
def test_speculation_in_order_has_no_reasons(dtype):
    assert told(speculation(kv_cache_dtype=dtype), "specattn") == []


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
    assert told(speculation(**changes), method) == [reason]


def test_several_reasons_are_all_given(reasons):
    found = reasons(target="windowed-narrow", draft=None, kv_sharing_fast_prefill=True, kv_cache_dtype="fp8_e5m2")
    assert [reason.split(":")[0] for reason in found] == [
        "kv_cache_dtype = 'fp8_e5m2'",
        "kv_sharing_fast_prefill",
        "target",
        "target",
        "method = 'specattn' without a draft model",
    ]


@pytest.mark.parametrize("method", ["specattn", "sketch", "dense"])
def test_drafts_may_be_drawn_from_the_draft_s_distribution(method):
    given = speculation(draft_sample_method="probabilistic")
    assert told(given, method) == []


@pytest.mark.parametrize(
    ("target", "draft", "refused"),
    [
        ("bfloat16", "auto", False),
        ("bfloat16", "bfloat16", False),
        ("fp8", "fp8", False),
        ("fp8", None, False),
        ("fp8", "auto", True),
        ("fp8", "bfloat16", True),
        ("bfloat16", "fp8", True),
    ],
)
def test_target_and_draft_share_a_type_of_cache(target, draft, refused):
    config = speculation(kv_cache_dtype=draft)
    config.cache_config.cache_dtype = target
    assert list(checks._speculation(config)) == refused * [
        f"draft kv_cache_dtype = {draft!r}: draft and target must share one; remove it"
    ]


@pytest.mark.parametrize(("target", "refused"), [("auto", True), ("bfloat16", False), ("fp8", False)])
def test_a_draft_whose_checkpoint_asks_for_fp8_needs_a_type_that_holds_for_both(target, refused):
    config = speculation()
    config.cache_config.cache_dtype = target
    draft = config.speculative_config.draft_model_config
    draft.hf_config.quantization_config = {"kv_cache_scheme": {"type": "float", "strategy": "tensor"}}
    found = list(checks._speculation(config))
    assert len(found) == refused and all(
        reason.endswith("name it (--kv-cache-dtype fp8, or bfloat16)") for reason in found
    )

"""What models cannot be served, each named with its side."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from specattn_vllm import checks
from specattn_vllm.layer_kinds import full_layers, stateful_layers
from specattn_vllm.methods import METHODS
from specattn_vllm.options import SpecAttnOptions


def test_a_window_is_refused_for_methods_that_watch_a_draft(reasons):
    assert reasons(target="alternating") == [
        "target: layers with sliding windows are not supported by method 'specattn'; use method 'sketch' or 'dense'"
    ]


@pytest.mark.parametrize("method", ["sketch", "dense"])
def test_a_window_in_some_layers_is_accepted(configure, method):
    assert configure(target="alternating", options={"method": method}).model_config.get_sliding_window() == 64


@pytest.mark.parametrize("method", ["sketch", "dense", "specattn"])
def test_a_window_in_every_layer_leaves_nothing_to_choose(reasons, method):
    assert reasons(target="windowed", options={"method": method}) == [
        "target: every layer has a sliding window, so there is nothing to choose; serve this model with vLLM's own "
        "backends"
    ]


@pytest.mark.parametrize("method", ["sketch", "dense", "specattn"])
def test_a_draft_model_with_a_window_is_refused(reasons, method):
    assert reasons(draft="windowed", options={"method": method}) == [
        "draft: sliding-window attention is not supported; use a draft model with full attention in every layer, "
        "another drafter, or none"
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ({"layer_types": ["chunked_attention", "full_attention"]}, "layers with chunked local attention"),
        ({"attention_chunk_size": 8}, "layers with chunked local attention"),
        ({"layer_types": ["linear_attention", "indexed_attention"]}, "layers that choose their tokens themselves"),
        ({"ple_layer_ids": [1]}, "layers with embeddings of their own (PLE)"),
    ],
)
def test_attention_that_the_kernels_do_not_compute_is_refused(text, what):
    config = SimpleNamespace(model_config=model(hf_text_config=SimpleNamespace(**text)), speculative_config=None)
    assert list(checks._models(config)) == [
        f"target: {what} are not supported; serve this model with vLLM's own backends (leave out "
        "--attention-backend specattn)"
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "sketch"}, None),
        ({"method": "dense"}, None),
        ({"method": "sketch", "epsilon": 0.2}, "is not supported by epsilon; leave it out"),
        ({"method": "sketch", "top_p": 0.9}, "is not supported by top_p, a share of the attention mass; set ratio in"),
        ({"method": "sketch", "top_p": 0.9, "ratio": 0.1, "rule": "top_k"}, None),
        ({"method": "vegas"}, "is not supported by method 'vegas'; use method 'sketch' or 'dense'"),
        ({"method": "specattn"}, "is not supported by method 'specattn'; use method 'sketch' or 'dense'"),
        ({"method": "dense", "executor": "xformers"}, "executor 'xformers' knows no soft cap on logits; use 'auto'"),
    ],
)
def test_soft_caps_on_logits(options, told):
    parsed = SpecAttnOptions.parse(options)

    def reasons(cap):
        text = SimpleNamespace(attn_logit_softcapping=cap)
        config = SimpleNamespace(
            model_config=model(hf_text_config=text, dtype="torch.bfloat16"),
            speculative_config=None,
            device_config=SimpleNamespace(device_type="cpu"),
            lora_config=None,
            parallel_config=SimpleNamespace(enable_eplb=False),
        )
        found = (*checks._soft_cap(config.model_config, parsed), *parsed.refusals(config))
        return [reason for reason in found if "soft cap" in reason]

    assert reasons(None) == []
    assert [told in reason for reason in reasons(50.0)] == ([True] if told else [])


def test_a_window_that_no_layer_has_is_none():
    """As Qwen2 says it, where all layers are below `max_window_layers`."""
    kinds = SimpleNamespace(layer_types=["full_attention"] * 3)
    config = SimpleNamespace(
        model_config=model(get_sliding_window=lambda: 64, hf_text_config=kinds), speculative_config=None
    )
    for method in ("sketch", "specattn"):
        options = SpecAttnOptions.parse({"method": method})
        assert not any("window" in reason for reason in (*checks._models(config), *options.refusals(config)))
    assert full_layers(config.model_config, 3) == 3
    kinds.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    assert full_layers(config.model_config, 3) == 2


@pytest.mark.parametrize(("method", "refused"), [("sketch", True), ("dense", False)])
def test_pages_of_a_windowed_target_and_a_drafter_have_to_be_alike(method, refused):
    """The sketch makes them larger, and vLLM then cannot join caches of other sizes."""
    kinds = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
    target = model(get_sliding_window=lambda: 64, hf_text_config=kinds, get_total_num_kv_heads=lambda: 16)
    draft = model(runner_type="draft", get_total_num_kv_heads=lambda: 8)
    config = SimpleNamespace(
        model_config=target,
        speculative_config=SimpleNamespace(draft_model_config=draft),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    config.speculative_config.uses_draft_model = lambda: False
    options = SpecAttnOptions.parse({"method": method})
    assert not list(checks._models(config))
    assert list(options.refusals(config)) == refused * [
        "a target with sliding windows and 16 KV heads of 128 beside a drafter with 8 of 128: use a drafter with the "
        "target's KV heads, or none"
    ]
    draft.get_total_num_kv_heads = lambda: 16
    assert not list(options.refusals(config))


HYBRID = {
    "is_hybrid": True,
    "hf_text_config": SimpleNamespace(layer_types=["linear_attention"] * 3 + ["full_attention"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_hybrid_models_are_for_methods_that_need_no_other_layers(method):
    target = model(**HYBRID)
    config = SimpleNamespace(model_config=target, speculative_config=None, lora_config=None)
    config.parallel_config = SimpleNamespace(enable_eplb=False)
    assert not list(checks._models(config))
    told = [reason for reason in SpecAttnOptions.parse({"method": method}).refusals(config) if "layers" in reason]
    assert told == (method not in ("sketch", "dense")) * [
        f"target: layers with linear attention or Mamba are not supported by method {method!r}; use method 'sketch' "
        "or 'dense'"
    ]
    assert full_layers(target, 4) == 1
    for kinds, full, stateful in (
        ({"layers_block_type": ["mamba", "attention", "mamba", "mlp"]}, 1, 2),
        ({"layer_types": ["linear_attention", "moe", "full_attention", "mlp"]}, 1, 1),
        ({"layers_block_type": ["hybrid"] * 4}, 4, 4),
        ({"layer_types": ["conv", "full_attention"] * 2}, 2, 2),
        ({}, 4, 0),
    ):
        found = model(is_hybrid=True, hf_text_config=SimpleNamespace(**kinds))
        assert (full_layers(found, 4), stateful_layers(found)) == (full, stateful), kinds
    without = model(is_hybrid=True, hf_text_config=SimpleNamespace(layer_types=["linear_attention"] * 4))
    config = SimpleNamespace(model_config=without, speculative_config=None)
    assert any("no layer has attention" in reason for reason in checks._models(config))


@pytest.mark.parametrize("uses_draft_model", [True, False])
def test_a_hybrid_drafts_only_as_vllm_has_it(uses_draft_model):
    spec = SimpleNamespace(draft_model_config=model(**HYBRID), uses_draft_model=lambda: uses_draft_model)
    config = SimpleNamespace(model_config=model(), speculative_config=spec)
    assert list(checks._models(config)) == uses_draft_model * [
        "draft: models with layers of linear attention or Mamba are not supported; use a draft model with full "
        "attention in every layer, another drafter, or none"
    ]


@pytest.mark.parametrize(
    ("dtype", "device", "size", "refused"),
    [
        ("torch.float32", "cuda", 256, True),
        ("torch.float32", "cuda", 128, False),
        ("torch.float32", "cpu", 256, False),
        ("torch.bfloat16", "cuda", 256, False),
    ],
)
def test_large_heads_in_float32_are_refused_where_the_sketch_has_no_room(dtype, device, size, refused):
    config = SimpleNamespace(
        model_config=model(dtype=dtype, get_head_size=lambda: size),
        device_config=SimpleNamespace(device_type=device),
        speculative_config=None,
    )
    told = list(SpecAttnOptions.parse({}).refusals(config))
    if refused:
        config.model_config.get_head_size = lambda: 64
        draft = SimpleNamespace(draft_model_config=model(get_head_size=lambda: size), uses_draft_model=lambda: True)
        config.speculative_config = draft
        assert list(SpecAttnOptions.parse({}).refusals(config)) == told
    assert told == refused * [
        "--dtype float32 with heads of 256: a GPU's shared memory has no room for the sketch's rotation in float32; "
        "use --dtype bfloat16"
    ]
    assert not list(SpecAttnOptions.parse({"method": "dense"}).refusals(config))


@pytest.mark.parametrize(
    ("cache", "poor", "refused"), [("fp8", True, True), ("fp8", False, False), ("auto", True, False)]
)
def test_windows_with_fp8_are_refused_on_a_cpu_whose_vllm_cannot_read_it(monkeypatch, cache, poor, refused):
    monkeypatch.setattr(checks, "_without_avx512", lambda: poor)
    kinds = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
    target = model(get_sliding_window=lambda: 64, hf_text_config=kinds)
    config = SimpleNamespace(model_config=target, cache_config=SimpleNamespace(cache_dtype=cache))
    assert list(checks._windows("target", target, config)) == refused * [
        "target: layers with a sliding window are vLLM's own, and those read fp8 on CPUs with AVX-512 alone; use "
        "kv_cache_dtype = 'auto'"
    ]


@pytest.mark.parametrize("side", ["target", "draft"])
def test_a_head_size_without_kernels_is_refused_with_those_that_have(reasons, side):
    assert reasons(**{side: "narrow"}) == [f"{side}: head size 32 is not supported; 64, 96, 128, 192 and 256 are"]


def model(**changes):
    """What `_models` looks at, with everything in order but the changes."""
    base = {
        "use_mla": False,
        "is_multimodal_model": False,
        "supports_multimodal_inputs": False,
        "is_encoder_decoder": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "get_sliding_window": lambda: None,
        "hf_text_config": SimpleNamespace(),
        "dtype": "bfloat16",
        "get_head_size": lambda: 128,
        "runner_type": "generate",
    }
    return SimpleNamespace(**base | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_mla": True, "get_head_size": lambda: 576}, "multi-head latent attention (MLA) is not supported"),
        (
            {"is_multimodal_model": True, "supports_multimodal_inputs": True},
            "multimodal inputs are not supported; use a text model, or --language-model-only",
        ),
        ({"is_encoder_decoder": True}, "encoder-decoder models are not supported"),
        ({"is_attention_free": True}, "no layer has attention, so there is nothing to choose"),
        ({"runner_type": "pooling"}, "runner 'pooling' does not decode; use a generating model"),
    ],
)
@pytest.mark.parametrize("side", ["target", "draft"])
def test_each_kind_of_model_is_named(changes, reason, side):
    """Kinds whose real configurations would need a model's code; whether vLLM sets these facts is its business."""
    pair = {"target": model(), "draft": model(runner_type="draft")}
    vars(pair[side]).update(changes)
    config = SimpleNamespace(
        model_config=pair["target"], speculative_config=SimpleNamespace(draft_model_config=pair["draft"])
    )
    (found,) = checks._models(config)
    assert found.startswith(f"{side}: ")
    assert reason in found


def test_a_multimodal_model_that_is_served_for_text_only_is_accepted():
    config = SimpleNamespace(model_config=model(is_multimodal_model=True), speculative_config=None)
    assert list(checks._models(config)) == []

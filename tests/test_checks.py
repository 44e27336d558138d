"""Start-up checks: each thing that cannot be served is refused with its reason and a remedy, before a model loads."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from specattn_vllm import checks, compat, layer_map, plugin
from specattn_vllm.checks import UnsupportedError
from specattn_vllm.fingerprint import fingerprint
from specattn_vllm.layer_map import LayerMapError
from specattn_vllm.options import OptionsError, SpecAttnOptions
from specattn_vllm.speculation.maps import model_facts, resolve_layer_map

HEADER = "--attention-backend specattn cannot serve this:"

# On other platforms vLLM itself refuses more processes than there are devices.
cpu_only = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM counts devices on other platforms")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Configurations of tiny models, by name; there is nothing to load, because nothing gets that far."""
    plugin.register()
    folder = tmp_path_factory.mktemp("models")
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "dtype": "float32",
    }
    # All with Llama's architecture: vLLM inspects each one's code in a process of its own, which takes long.
    made = {
        "target": LlamaConfig(**shape),
        "draft": LlamaConfig(**shape | {"num_hidden_layers": 2}),
        "narrow": LlamaConfig(**shape | {"head_dim": 32}),
        "windowed": MistralConfig(**shape, sliding_window=64),
        "windowed-narrow": MistralConfig(**shape | {"head_dim": 32}, sliding_window=64),
        # Qwen2 configurations name a window that is switched off.
        "window-unused": Qwen2Config(**shape, sliding_window=64, use_sliding_window=False),
    }
    for name, config in made.items():
        config.save_pretrained(folder / name)
    # Written by hand, as old configurations are: no KV heads, no head size.
    bare = {k: v for k, v in shape.items() if k not in ("num_key_value_heads", "head_dim", "dtype")}
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text(json.dumps(bare | {"model_type": "llama"}))
    save_file({"lm_head.weight": torch.zeros(8)}, folder / "bare" / "model.safetensors")
    return {name: str(folder / name) for name in (*made, "bare")}


@pytest.fixture
def configure(models):
    """configure(...): vLLM's finished configuration of an engine, as a user's command makes it."""

    def make(target="target", draft="draft", options=None, backend="specattn", spec=None, others=None, **arguments):
        if draft is not None:
            spec = {"model": models[draft], "num_speculative_tokens": 2} | (spec or {})
        return EngineArgs(
            model=models[target],
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            max_model_len=128,
            attention_backend=backend,
            additional_config=(others or {}) | ({} if options is None else {"specattn": options}),
            speculative_config=spec,
            **arguments,
        ).create_engine_config()

    return make


@pytest.fixture
def reasons(configure):
    """reasons(...): the lines with which a configuration is refused."""

    def refused(**arguments) -> list[str]:
        with pytest.raises(UnsupportedError) as caught:
            configure(**arguments)
        header, *lines = str(caught.value).splitlines()
        assert header == HEADER
        assert all(line.startswith("  ") for line in lines)
        return [line.strip() for line in lines]

    return refused


# What is served


def test_a_pair_of_models_is_accepted(configure):
    config = configure()
    assert config.attention_config.backend.name == "SPECATTN"
    assert config.speculative_config.uses_draft_model()


def test_options_are_accepted_and_kept(configure):
    config = configure(options={"top_p": 0.5, "dense_layers": [1]})
    assert SpecAttnOptions.from_vllm(config) == SpecAttnOptions(top_p=0.5, dense_layers=(1,))


def test_dense_is_accepted_with_and_without_a_draft(configure):
    assert configure(options={"method": "dense"}).speculative_config is not None
    assert configure(options={"method": "dense"}, draft=None).speculative_config is None


def test_a_window_that_is_switched_off_is_accepted(configure):
    configure(target="window-unused", draft="window-unused")


@pytest.mark.parametrize("backend", [None, "TRITON_ATTN"])
def test_other_backends_are_not_checked(configure, backend):
    # Nothing of this could be served by ours.
    configure(target="narrow", draft=None, backend=backend)


@pytest.mark.parametrize("backend", ["specattn", None])
def test_options_of_other_plugins_are_their_own_business(configure, backend):
    configure(others={"another_plugin": 1}, backend=backend)


@cpu_only
def test_tensor_parallel_pairs_are_accepted(configure):
    config = configure(tensor_parallel_size=2)
    assert config.speculative_config.draft_parallel_config.tensor_parallel_size == 2


@pytest.mark.parametrize("offline", [False, True])
def test_no_number_of_draft_tokens_is_needed(models, offline):
    """`vllm serve TARGET --speculative-model DRAFT --attention-backend specattn`, and the same offline."""
    arguments = dict(model=models["target"], skip_tokenizer_init=True, enforce_eager=True, dtype="float32")
    if offline:
        arguments["speculative_config"] = {"model": models["draft"]}
    else:
        arguments["spec_model"] = models["draft"]
    # vLLM writes into the dictionary that it is given.
    config = EngineArgs(**copy.deepcopy(arguments), attention_backend="specattn").create_engine_config()
    assert config.speculative_config.num_speculative_tokens == compat.DEFAULT_DRAFT_LENGTH
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        EngineArgs(**arguments).create_engine_config()


def test_a_number_of_draft_tokens_is_kept(configure):
    assert configure(spec={"num_speculative_tokens": 3}).speculative_config.num_speculative_tokens == 3


SELF = pytest.mark.parametrize("method", ["vegas", "streamingllm"])


def completed(arguments: dict):
    """The speculative configuration of `EngineArgs(**arguments)`; vLLM writes into the dictionaries it is given."""
    base = dict(skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=128)
    return EngineArgs(**copy.deepcopy(base | arguments)).create_engine_config().speculative_config


@SELF
def test_a_target_that_drafts_for_itself_need_not_be_named_twice(models, method):
    arguments = dict(model=models["target"], additional_config={"specattn": {"method": method}})
    spec = completed(arguments | {"attention_backend": "specattn"})
    assert spec.model == spec.draft_model_config.model == models["target"]
    assert (spec.method, spec.num_speculative_tokens) == ("draft_model", compat.SELF_DRAFT_LENGTH)


@pytest.mark.parametrize(
    "backend",
    [{"attention_backend": "SPECATTN"}, {"attention_config": {"backend": "specattn"}}],
    ids=["in capitals", "attention_config"],
)
def test_the_shorthand_goes_by_the_backend_however_it_is_named(models, backend):
    arguments = dict(model=models["target"], additional_config={"specattn": {"method": "vegas"}})
    assert completed(arguments | backend).model == models["target"]


@pytest.mark.parametrize(
    "given",
    [{"spec_tokens": 3}, {"speculative_config": {"num_speculative_tokens": 3}},
     {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 3}}],
    ids=str,
)  # fmt: skip
def test_what_is_given_about_drafts_is_kept(models, given):
    arguments = dict(model=models["target"], additional_config={"specattn": {"method": "vegas"}})
    spec = completed(arguments | given | {"attention_backend": "specattn"})
    assert (spec.model, spec.num_speculative_tokens) == (models["target"], 3)


def test_a_target_with_another_method_s_name_is_refused_with_the_remedy(models, tmp_path):
    """vLLM goes by the draft model's name, which here is the target's, whatever method is given."""
    folder = tmp_path / "my-eagle-target"
    shutil.copytree(models["target"], folder)
    arguments = dict(model=str(folder), additional_config={"specattn": {"method": "vegas"}})
    with pytest.raises(UnsupportedError, match=r"speculative method 'eagle': .* has to be renamed"):
        completed(arguments | {"attention_backend": "specattn"})


@pytest.mark.parametrize("options", [{}, {"specattn": {}}, {"specattn": {"method": "dense"}}], ids=str)
def test_other_methods_are_given_no_draft_model(options):
    asked = EngineArgs(model="target", attention_backend="specattn", additional_config=options)
    compat.complete_speculation(asked)
    assert (asked.spec_model, asked.spec_tokens, asked.spec_method) == (None, None, None)


@pytest.mark.parametrize("backend", [None, "TRITON_ATTN"])
def test_other_backends_are_given_nothing(backend):
    asked = EngineArgs(
        model="target", attention_backend=backend, spec_model="draft",
        additional_config={"specattn": {"method": "vegas"}},
    )  # fmt: skip
    compat.complete_speculation(asked)
    assert (asked.spec_model, asked.spec_tokens, asked.spec_method) == ("draft", None, None)


# Options


@pytest.mark.parametrize(("backend", "shown"), [(None, "left to vLLM"), ("TRITON_ATTN", "TRITON_ATTN")])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}])
def test_options_without_the_backend_are_refused(configure, backend, shown, options):
    with pytest.raises(OptionsError) as caught:
        configure(backend=backend, options=options)
    message = str(caught.value)
    assert f"additional_config['specattn'] is set, but the attention backend is {shown}" in message
    assert "add --attention-backend specattn, or remove them" in message


@pytest.mark.parametrize("options", [None, {"top_p": 0.5}])
def test_the_backend_for_some_kinds_of_layers_is_refused(configure, options):
    with pytest.raises(UnsupportedError, match=r"backend_per_kind .*use --attention-backend specattn alone"):
        configure(backend=None, options=options, attention_config={"backend_per_kind": {"full_attention": "specattn"}})
    with pytest.raises(UnsupportedError, match=r"backend_per_kind .*use --attention-backend specattn alone"):
        configure(
            backend=None,
            options=options,
            attention_config={"backend": "specattn", "backend_per_kind": {"full_attention": "TRITON_ATTN"}},
        )


@pytest.fixture
def warnings(monkeypatch):
    """The warnings so far."""
    given = []
    monkeypatch.setattr(checks.logger, "warning", lambda message, *args: given.append(message % args))
    return given


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"top_p": 0.5, "executor": "torch"}, "top_p"),
        ({"crossover_tokens": 5, "combine": "max", "min_tokens": 7}, "combine, crossover_tokens, min_tokens"),
        # Off, the draft reads everything too.
        ({"sparse_draft": False, "sink_tokens": 2, "stats_interval_s": 5}, "sink_tokens"),
        # On, the rule chooses for the draft: only what is about the target does nothing.
        (
            {"sparse_draft": True, "top_p": 0.5, "layer_map": "uniform", "dense_layers": [1], "combine": "max"},
            "combine, dense_layers, layer_map",
        ),
        ({"sparse_draft": True, "crossover_tokens": 5, "check_weights": False}, "check_weights"),
        ({"sparse_draft": True, "refresh_every": 4}, "refresh_every"),
        ({"refresh_every": 4}, "refresh_every"),
        ({"audit_share": 0.5}, "audit_share"),
        (
            {"sparse_draft": True, "audit_share": 0.5, "audit_floor": 0.8, "audit_dense_rounds": 4},
            "audit_dense_rounds, audit_floor, audit_share",
        ),
    ],
    ids=lambda value: str(value),
)
def test_options_without_effect_are_named(configure, warnings, options, idle):
    """A control run may differ by its method alone, but nobody should believe that its other options did something."""
    configure(options={"method": "dense", **options})
    assert [message.split("without effect: ")[1] for message in warnings] == [idle]


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        # Whatever decides what verification reads, which is everything.
        (
            {"method": "vegas", "layer_map": "uniform", "combine": "max", "dense_layers": [1], "refresh_every": 4}
            | {"check_weights": False, "sparse_draft": True, "audit_share": 0.5, "audit_floor": 0.8},
            "audit_floor, audit_share, check_weights, combine, dense_layers, layer_map, refresh_every, sparse_draft",
        ),
        (
            {"method": "streamingllm", "top_p": 0.5, "rule": "top_p", "per_kv_head": True, "dilation": 3, "ratio": 0.2},
            "dilation, per_kv_head, rule, top_p",
        ),
        ({"method": "specattn", "per_kv_head": True, "dilation": 3}, "dilation, per_kv_head"),
        ({"method": "sts", "size_top_p": 0.9, "history_weight": 0.2}, "history_weight, size_top_p"),
        # What the draft reads is chosen by the rule, what the target reads is not.
        ({"method": "fused", "rule": "top_k", "ratio": 0.2, "top_p": 0.5, "dilation": 2}, "top_p"),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "idle",
)
def test_options_of_other_methods_are_named(configure, warnings, options, idle):
    draft = "target" if options["method"] in ("vegas", "streamingllm") else "draft"
    configure(options=options, draft=draft)
    assert [message.split("without effect: ")[1] for message in warnings] == [idle]


@pytest.mark.parametrize("options", [{"preset": "paper"}, {"per_kv_head": True, "dilation": 5, "crossover_tokens": 9}])
def test_options_of_vegas_have_an_effect_there(configure, warnings, options):
    configure(options={"method": "vegas", **options}, draft="target")
    assert not [message for message in warnings if "without effect" in message]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dense"},
        {"method": "dense", "executor": "torch", "stats_interval_s": 5, "sparse_draft": False},
        {"method": "dense", "sparse_draft": True},
        {"method": "dense", "sparse_draft": True, "top_p": 0.5, "min_tokens": 7, "max_tokens": 300, "max_fraction": 0.5}
        | {"sink_tokens": 2, "recent_tokens": 3, "crossover_tokens": 9, "executor": "torch"},
        {"top_p": 0.5, "sparse_draft": True, "combine": "max", "dense_layers": [1]},
        {"method": "fused", "sparse_draft": True, "rule": "top_k", "ratio": 0.2, "size_top_p": 0.9, "size_factor": 2}
        | {"refresh_every": 4, "combine": "max", "layer_map": "uniform"},
    ],
    ids=lambda options: ", ".join(options),
)
def test_options_with_an_effect_are_not(configure, warnings, options):
    configure(options=options)
    assert not [message for message in warnings if "without effect" in message]


def test_a_control_run_may_name_every_layer_dense(configure):
    configure(options={"method": "dense", "dense_layers": [0, 1, 2]})


def test_a_map_that_is_named_is_checked_even_where_it_has_no_effect(configure):
    with pytest.raises(LayerMapError, match="cannot be read"):
        configure(options={"method": "dense", "layer_map": "nowhere.json"})


def test_bad_options_are_refused_before_anything_else(configure):
    with pytest.raises(OptionsError, match="top_q: unknown option"):
        configure(options={"top_q": 1}, draft=None)


# The engine


def test_a_quantised_cache_is_refused(reasons):
    assert reasons(kv_cache_dtype="fp8") == [
        "kv_cache_dtype = 'fp8': the cache must have the model's dtype, float32 (quantised caches are not supported); "
        "use 'auto'",
    ]


@cpu_only
def test_pipeline_parallelism_is_refused(reasons):
    assert reasons(pipeline_parallel_size=2) == [
        "pipeline_parallel_size = 2: the draft runs on the last rank only; use 1",
    ]


@cpu_only
def test_context_parallelism_is_refused(reasons):
    arguments = {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
    assert reasons(**arguments) == ["decode_context_parallel_size = 2: use 1"]


def test_lora_is_refused(reasons):
    assert reasons(enable_lora=True) == ["LoRA: the layer map is made for one set of weights; serve merged weights"]


def test_a_kv_connector_is_refused(reasons):
    assert reasons(kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}) == [
        "a KV connector (kv_transfer_config): the draft's cache would not be transferred; remove it",
    ]


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
        "model_config": SimpleNamespace(dtype="torch.bfloat16"),
        "parallel_config": SimpleNamespace(
            **{"pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "use_ubatching": False}
            | (parallel or {})
        ),
        "cache_config": SimpleNamespace(**{"cache_dtype": "auto", "kv_sharing_fast_prefill": False} | (cache or {})),
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


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2", "fp8_e4m3", "nvfp4", "float16"])
def test_each_quantised_cache_is_named(dtype):
    (reason,) = checks._engine(engine(cache={"cache_dtype": dtype}))
    assert reason.startswith(f"kv_cache_dtype = {dtype!r}: ")


def test_microbatches_are_named():
    (reason,) = checks._engine(engine(parallel={"use_ubatching": True}))
    assert reason.startswith("microbatches (enable_dbo, ubatch_size)")


def test_the_cache_may_name_the_models_own_dtype():
    assert list(checks._engine(engine(cache={"cache_dtype": "bfloat16"}))) == []


def test_probabilistic_drafts_are_refused_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setattr(checks, "_interpreted", lambda: True)
    (reason,) = checks._speculation(speculation(draft_sample_method="probabilistic"), SpecAttnOptions())
    assert "'probabilistic'" in reason and "use 'greedy'" in reason
    monkeypatch.setattr(checks, "_interpreted", lambda: False)
    assert list(checks._speculation(speculation(draft_sample_method="probabilistic"), SpecAttnOptions())) == []


# The models


@pytest.mark.parametrize("side", ["target", "draft"])
def test_a_sliding_window_is_refused(reasons, side):
    assert reasons(**{side: "windowed"}) == [
        f"{side}: sliding-window attention is not supported; use a model with full attention in every layer",
    ]


@pytest.mark.parametrize("side", ["target", "draft"])
def test_a_head_size_without_kernels_is_refused_with_those_that_have(reasons, side):
    assert reasons(**{side: "narrow"}) == [f"{side}: head size 32 is not supported; 64 and 128 are"]


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
        ({"is_hybrid": True}, "models with layers other than attention are not supported"),
        ({"is_attention_free": True}, "models with layers other than attention are not supported"),
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


# Speculation


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


# The layer map


def write_map(path, target: str, draft: str, **changes) -> str:
    layers = [None, 0, 1]
    path.write_text(
        json.dumps(
            {
                "schema": layer_map.SCHEMA,
                "method": "specattn",
                "calibrated": True,
                "target": fingerprint(target) | changes,
                "draft": fingerprint(draft),
                "layers": layers,
            }
        )
    )
    return str(path)


def test_a_map_made_for_these_models_is_accepted(configure, models, tmp_path):
    path = write_map(tmp_path / "map.json", models["target"], models["draft"])
    config = configure(options={"layer_map": path, "dense_layers": [2]})
    assert resolve_layer_map(config, SpecAttnOptions.from_vllm(config)).layers == (None, 0, None)


def test_a_map_made_for_other_models_is_refused_at_start_up(configure, models, tmp_path):
    path = write_map(tmp_path / "map.json", models["target"], models["draft"], vocab_size=129)
    with pytest.raises(LayerMapError, match=r"made for other models .*target vocab_size: 129 != 128"):
        configure(options={"layer_map": path})


def test_a_map_that_is_not_there_is_refused_at_start_up(configure):
    with pytest.raises(LayerMapError, match=r"layer_map = 'nowhere\.json' cannot be read"):
        configure(options={"layer_map": "nowhere.json"})


def test_a_dense_layer_the_target_does_not_have_is_refused_at_start_up(configure):
    with pytest.raises(LayerMapError, match="dense_layers contains 3, but the target has layers 0 to 2"):
        configure(options={"dense_layers": [3]})


def test_nothing_left_to_prune_is_refused(configure):
    with pytest.raises(LayerMapError, match=r"every target layer is dense .*method='dense'"):
        configure(options={"dense_layers": [0, 1, 2]})


@cpu_only
def test_selections_per_head_need_as_many_heads_on_every_rank(configure):
    """The models have one KV head, which vLLM would give to both ranks."""
    configure(options={"method": "specattn"}, tensor_parallel_size=2)
    for method in ("sts", "fused"):
        configure(options={"method": method})
        with pytest.raises(LayerMapError, match="tensor_parallel_size = 2 does not divide the 1 KV heads of the targ"):
            configure(options={"method": method}, tensor_parallel_size=2)


@pytest.mark.parametrize("name", ["target", "windowed", "bare"])
def test_an_engine_sees_the_facts_that_a_fingerprint_wrote(configure, models, name):
    """Maps are made from a folder and checked against vLLM's configuration: both have to read it alike."""
    config = configure(target=name, draft=name, backend=None)
    facts = fingerprint(models[name])
    assert model_facts(config.model_config).model_dump() == facts
    assert model_facts(config.speculative_config.draft_model_config).model_dump() == facts
    assert (facts["weights"] is not None) == (name == "bare")


@pytest.mark.parametrize(("tokens", "fits"), [(14, True), (15, False)])
def test_a_first_draft_step_that_reads_a_list_has_room_for_so_many_tokens(configure, tokens, fits):
    def make():
        configure(options={"sparse_draft": True, "refresh_draft_every": 4}, spec={"num_speculative_tokens": tokens})

    if fits:
        make()
        return
    message = r"refresh_draft_every = 4 with num_speculative_tokens = 15: .*room for 14"
    with pytest.raises(UnsupportedError, match=message):
        make()
    configure(options={"sparse_draft": True}, spec={"num_speculative_tokens": tokens})

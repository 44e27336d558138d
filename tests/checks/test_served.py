"""What is served: configurations that pass, and what start-up fills in."""

from __future__ import annotations

import copy
import shutil

import pytest

pytest.importorskip("vllm")
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from specattn_vllm.checks import UnsupportedError
from specattn_vllm.compat import start
from specattn_vllm.options import SpecAttnOptions

# On other platforms vLLM itself refuses more processes than there are devices.
cpu_only = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM counts devices on other platforms")


def test_a_pair_of_models_is_accepted(configure):
    config = configure()
    assert config.attention_config.backend.name == "SPECATTN"
    assert config.speculative_config.uses_draft_model()


def test_options_are_accepted_and_kept(configure):
    config = configure(options={"top_p": 0.5, "dense_layers": [1]})
    asked = {"method": "specattn", "top_p": 0.5, "dense_layers": (1,)}
    assert SpecAttnOptions.from_vllm(config) == SpecAttnOptions.parse(asked)


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
    assert config.speculative_config.num_speculative_tokens == 4
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
    assert (spec.method, spec.num_speculative_tokens) == ("draft_model", 6)


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
    [
        {"spec_tokens": 3},
        {"speculative_config": {"num_speculative_tokens": 3}},
        {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 3}},
    ],
    ids=str,
)
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
    start.complete_speculation(asked)
    assert (asked.spec_model, asked.spec_tokens, asked.spec_method) == (None, None, None)


@pytest.mark.parametrize("backend", [None, "TRITON_ATTN"])
def test_other_backends_are_given_nothing(backend):
    asked = EngineArgs(
        model="target",
        attention_backend=backend,
        spec_model="draft",
        additional_config={"specattn": {"method": "vegas"}},
    )
    start.complete_speculation(asked)
    assert (asked.spec_model, asked.spec_tokens, asked.spec_method) == ("draft", None, None)

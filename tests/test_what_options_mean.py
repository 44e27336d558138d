"""Options: where an engine has them from, and what follows from them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from specattn_vllm.methods import METHODS
from specattn_vllm.options import OptionsError, SpecAttnOptions


def test_an_engine_s_options_come_from_its_additional_config():
    config = SimpleNamespace(additional_config={"specattn": {"top_p": 0.5}, "other_plugin": {"x": 1}})
    assert SpecAttnOptions.from_vllm(config) == SpecAttnOptions.parse({"top_p": 0.5})


@pytest.mark.parametrize("additional_config", [{}, {"other_plugin": 1}, object()])
def test_an_engine_without_the_key_gets_the_defaults(additional_config):
    # vLLM also takes any hashable object there.
    assert SpecAttnOptions.from_vllm(SimpleNamespace(additional_config=additional_config)) == SpecAttnOptions.parse({})


def test_an_engine_s_bad_options_are_refused():
    with pytest.raises(OptionsError, match="must be an object"):
        SpecAttnOptions.from_vllm(SimpleNamespace(additional_config={"specattn": None}))


@pytest.mark.parametrize("executor", ["auto", "torch", "triton", "fa3", "xformers"])
def test_every_executor_can_be_named(executor):
    assert SpecAttnOptions.parse({"executor": executor}).executor == executor


@pytest.mark.parametrize("tokens", [None, 0, 1, 2**31 - 1])
def test_a_crossover_may_be_left_open_or_be_nothing(tokens):
    assert SpecAttnOptions.parse({"crossover_tokens": tokens}).crossover_tokens == tokens


def test_where_the_target_reads_everything_it_is_lossless():
    for method in ("dense", "vegas", "streamingllm"):
        assert SpecAttnOptions.parse({"method": method}).kind.lossless
    assert not SpecAttnOptions.parse({"method": "specattn"}).kind.lossless
    # What the draft reads changes which tokens it proposes, not which are accepted.
    assert SpecAttnOptions.parse({"method": "dense", "sparse_draft": True}).kind.lossless
    assert not SpecAttnOptions.parse({"method": "sts", "ratio": 1.0}).kind.lossless
    # The method decides, not what one setting of it happens to keep.
    assert not SpecAttnOptions.parse({"method": "specattn", "top_p": 1.0}).kind.lossless


@pytest.mark.parametrize(
    ("method", "rule", "fixed"),
    [
        ("specattn", None, True),
        ("sts", None, True),
        ("specattn", "top_k", True),
        ("sts", "top_p", False),
        ("vegas", None, True),
        ("vegas", "top_p", False),
    ],
)
def test_the_rule_is_that_of_the_method_unless_given(method, rule, fixed):
    given = {"method": method} | ({} if rule is None else {"rule": rule})
    assert SpecAttnOptions.parse(given).fixed_budget == fixed
    assert SpecAttnOptions.parse({"method": "streamingllm"}).fixed_budget


def test_the_rule_is_that_of_the_value_that_is_given():
    for method in ("specattn", "sts", "vegas", "sketch"):
        assert not SpecAttnOptions.parse({"method": method, "top_p": 0.9}).fixed_budget
        assert SpecAttnOptions.parse({"method": method, "ratio": 0.2}).fixed_budget
    assert SpecAttnOptions.parse({"top_p": 0.9, "ratio": 0.2, "rule": "top_k"}).fixed_budget
    with pytest.raises(OptionsError, match=r"top_p 0\.9 and ratio 0\.2 are of two rules.*rule='top_p' or rule='top_k'"):
        SpecAttnOptions.parse({"top_p": 0.9, "ratio": 0.2})


def test_which_targets_draft_for_themselves():
    methods = [m for m in METHODS if SpecAttnOptions.parse({"method": m}).draft_model("target", "draft") == "target"]
    assert methods == ["vegas", "streamingllm"]
    assert all(METHODS[m].draft_length == (6 if m in methods else 4) for m in METHODS)
    assert SpecAttnOptions.parse({"method": "sketch"}).draft_model("target", None) is None


def test_which_methods_choose_per_head():
    assert {m for m in METHODS if SpecAttnOptions.parse({"method": m}).kind.per_head} == {"sketch", "sts"}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"method": "vegas"}, [2, 5, 64, 64]),  # as far as a round goes, and no farther than the kernel does
        ({"method": "vegas", "preset": "paper"}, [0, 0, 0, 0]),
        ({"method": "vegas", "dilation": 0}, [0, 0, 0, 0]),
        ({"method": "vegas", "dilation": 3}, [3, 3, 3, 3]),
        ({"method": "vegas", "dilation": 64}, [64, 64, 64, 64]),
    ],
    ids=str,
)
def test_attention_is_spread_over_a_round_unless_told_otherwise(options, found):
    assert [SpecAttnOptions.parse(options).dilation_of(k) for k in (1, 4, 63, 100)] == found

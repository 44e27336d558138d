"""Options of ours that stand elsewhere, or under a name that is nearly ours: refused, or a server that was asked to be
lossless would be approximate."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm")

from specattn_vllm.compat import start
from specattn_vllm.misplaced import resembles
from specattn_vllm.options import OptionsError, owners, refuse_misplaced

NEAR = [
    "spec_attn",
    "spec-attn",
    "SpecAttn",
    "specatn",
    "specattn_vllm",
    "specattn-vllm",
    "specattn.method",
    "spec_attention",
]
OTHERS = ["another_plugin", "sparse_attn", "speculation", "spec", "attn", "kda_prefill_backend", "refresh", 1]


def refusal(config, *, ours: bool = True) -> str:
    with pytest.raises(OptionsError) as caught:
        refuse_misplaced(config, ours=ours)
    return str(caught.value)


def test_an_option_beside_our_key_is_refused_at_start_up(configure):
    with pytest.raises(OptionsError) as caught:
        configure(others={"method": "dense"}, bare=True)
    message = str(caught.value)
    assert "'method' is an option of 'specattn' but stands outside of it" in message
    assert """give --additional-config '{"specattn": {"method": "dense"}}'""" in message


def test_a_near_miss_of_our_key_is_refused_at_start_up(configure):
    with pytest.raises(OptionsError) as caught:
        configure(others={"spec_attn": {"method": "dense"}}, bare=True)
    message = str(caught.value)
    assert "'spec_attn' is not a name that anything reads; ours is 'specattn'" in message
    assert """give --additional-config '{"specattn": {"method": "dense"}}'""" in message


@pytest.mark.parametrize("option", owners())
def test_every_option_is_known_outside_of_the_key(option):
    assert f"{option!r} is an option" in refusal({option: 1})
    assert f"{option.upper()!r} is an option" in refusal({option.upper(): 1})


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_named_with_what_they_hold(name):
    message = refusal({name: {"ratio": 0.5}})
    assert repr(name) in message and '{"specattn": {"ratio": 0.5}}' in message


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_others_are_their_own_business(name):
    assert not resembles(name, "specattn")
    refuse_misplaced({name: {"x": 1}, "specattn": {}}, ours=True)
    refuse_misplaced({name: 1}, ours=False)


@pytest.mark.parametrize(
    ("config", "meant"),
    [
        ({"mthod": "dense"}, {"method": "dense"}),
        ({"ratios": 0.5}, {"ratio": 0.5}),
        ({"dense": True}, {"method": "dense"}),
        ({"Vegas": {}}, {"method": "vegas"}),
    ],
)
def test_misspelt_options_and_methods_count_where_nothing_is_set_under_our_key(config, meant):
    assert json.dumps({"specattn": meant}) in refusal(config)
    refuse_misplaced(config | {"specattn": {}}, ours=True)
    refuse_misplaced(config, ours=False)


def test_all_slips_are_told_at_once():
    lines = refusal({"spec_attn": {}, "ratio": 0.5, "top_p": 0.5}).splitlines()
    assert [line.split("'")[1] for line in lines[1:]] == ["spec_attn", "ratio", "top_p"]


def test_another_plugin_may_have_an_option_of_the_same_name():
    """What is set under our key too is no slip outside of it."""
    refuse_misplaced({"method": "theirs", "specattn": {"method": "dense"}}, ours=True)
    assert "belongs to another plugin" in refusal({"method": "theirs", "specattn": {"ratio": 0.5}})


def test_our_key_inside_of_another_object_is_refused():
    message = refusal({"additional_config": {"specattn": {"method": "dense"}}})
    assert "'specattn' stands inside 'additional_config'" in message


def test_without_our_backend_only_our_own_name_counts(configure):
    refuse_misplaced({"method": "theirs", "specatn": 1}, ours=False)
    with pytest.raises(OptionsError, match="'spec_attn' is not a name that anything reads"):
        configure(others={"spec_attn": {}}, backend=None)


def test_it_is_refused_before_what_is_missing_is_filled_in():
    """A misplaced 'vegas' would need no draft model, and vLLM would complain of that first."""
    from vllm.engine.arg_utils import EngineArgs

    asked = EngineArgs(model="target", attention_backend="specattn", additional_config={"method": "vegas"})
    with pytest.raises(OptionsError, match="'method' is an option of 'specattn'"):
        start.complete_speculation(asked)

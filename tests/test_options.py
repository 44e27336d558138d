"""Options: what is accepted, what is refused, and that a refusal says what to do."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from specattn_vllm.methods import METHODS
from specattn_vllm.options import OptionsError, SpecAttnOptions
from specattn_vllm.sketch.guarantee import promise_of


def refusal(raw) -> str:
    with pytest.raises(OptionsError) as caught:
        SpecAttnOptions.parse(raw)
    return str(caught.value)


COMMON = {"preset": None, "executor": "auto", "stats_interval_s": 60.0}
SHARE = COMMON | {
    "ratio": 0.1,
    "min_tokens": 128,
    "max_tokens": None,
    "max_fraction": 1.0,
    "sink_tokens": 4,
    "recent_tokens": 64,
    "crossover_tokens": None,
}
BUDGET = SHARE | {"rule": None, "top_p": 0.9}
SPARSE_DRAFT = BUDGET | {"sparse_draft": False, "draft_ratio": None, "sketch_bits": 2}
BY_DRAFT = BUDGET | {"layer_map": None, "dense_layers": (), "combine": "sum", "audit_share": 0.0}
DEFAULTS = {
    "sketch": SPARSE_DRAFT
    | {"ratio": 0.125, "sparse_draft": True, "shared_budget": "layers", "audit_share": 0.0}
    | {"epsilon": None, "delta": 0.05, "draws": 64},
    "specattn": BY_DRAFT | {"ratio": 0.25},
    "sts": BY_DRAFT,
    "vegas": BUDGET | {"dilation": None},
    "streamingllm": SHARE,
    "dense": SPARSE_DRAFT,
}
"""Written out: changing one changes what every user of the method gets."""


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_the_documented_ones(method):
    assert SpecAttnOptions.parse({"method": method}).model_dump() == {"method": method} | DEFAULTS[method]


def test_the_default_method_is_sketch():
    assert SpecAttnOptions.parse({}) == SpecAttnOptions.parse({"method": "sketch"})


EVERY = {
    "preset": None,
    "layer_map": "uniform",
    "rule": "top_k",
    "top_p": 0.8,
    "ratio": 0.25,
    "sketch_bits": 4,
    "shared_budget": "none",
    "min_tokens": 0,
    "max_tokens": 10,
    "max_fraction": 0.25,
    "sink_tokens": 0,
    "recent_tokens": 10,
    "combine": "union",
    "dilation": 5,
    "dense_layers": (0, 3),
    "audit_share": 0.05,
    "sparse_draft": True,
    "draft_ratio": 0.5,
    "crossover_tokens": 4096,
    "epsilon": 0.1,
    "delta": 0.01,
    "draws": 128,
    "executor": "torch",
    "stats_interval_s": 0.5,
}


@pytest.mark.parametrize("method", METHODS)
def test_every_option_can_be_set(method):
    assert set(EVERY) == {name for defaults in DEFAULTS.values() for name in defaults}, "an option was added: cover it"
    raw = {"method": method} | {name: EVERY[name] for name in DEFAULTS[method]}
    if method == "dense":  # draft_ratio stands in for them
        raw = {name: value for name, value in raw.items() if name not in ("rule", "top_p", "ratio", "max_fraction")}
    options = SpecAttnOptions.parse(raw)
    assert {name: value for name, value in options.model_dump().items() if name in raw} == raw


def test_options_cannot_be_changed_after_they_were_checked():
    options = SpecAttnOptions.parse({})
    with pytest.raises(ValidationError, match="frozen"):
        options.top_p = 5.0
    assert options.top_p == 0.9


def test_an_unknown_option_is_named_with_the_known_ones():
    message = refusal({"top_q": 0.5})
    assert "top_q: unknown option" in message
    known = message.split("known: ")[1].split(". Remove")[0].split(", ")
    assert known == list(METHODS["sketch"].options.model_fields)
    assert message.endswith("Remove it or correct its name.")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("top_p", 0.0, "greater than 0"),
        ("top_p", 1.01, "less than or equal to 1"),
        ("top_p", float("nan"), "less than or equal to 1"),  # json.loads takes NaN
        ("top_p", "high", "valid number"),
        ("min_tokens", -1, "greater than or equal to 0"),
        ("min_tokens", 1.5, "valid integer"),
        ("min_tokens", 2**31, "less than or equal to 2147483647"),
        ("max_tokens", 2**31, "less than or equal to 2147483647"),
        ("sink_tokens", 2**31, "less than or equal to 2147483647"),
        ("recent_tokens", 2**31, "less than or equal to 2147483647"),
        ("max_tokens", 0, "greater than or equal to 1"),
        ("max_fraction", 0.0, "greater than 0"),
        ("max_fraction", 1.5, "less than or equal to 1"),
        ("sink_tokens", -1, "greater than or equal to 0"),
        ("recent_tokens", -1, "greater than or equal to 0"),
        ("stats_interval_s", 0.0, "greater than 0"),
        ("dense_layers", 3, "valid tuple"),
        ("dilation", -1, "greater than or equal to 0"),
        ("dilation", 65, "less than or equal to 64"),
        ("combine", "mean", "'sum' or 'union'"),
        ("executor", "cuda", "'auto', 'torch', 'triton', 'fa3' or 'xformers'"),
        ("audit_share", -0.1, "greater than or equal to 0"),
        ("audit_share", 1.01, "less than or equal to 1"),
        ("audit_share", float("nan"), "less than or equal to 1"),
        ("sparse_draft", "perhaps", "valid boolean"),
        ("crossover_tokens", -1, "greater than or equal to 0"),
        ("crossover_tokens", 2**31, "less than or equal to 2147483647"),
        ("crossover_tokens", 1.5, "valid integer"),
        ("layer_map", 7, "valid string"),
        ("preset", "papers", "'paper'"),
        ("preset", ["paper"], "'paper'"),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(key, value, allowed):
    method = next(name for name in ("sketch", "specattn", "vegas") if key in METHODS[name].options.model_fields)
    message = refusal({"method": method, key: value})
    assert "--additional-config" in message
    assert f"{key} = {value!r}: " in message
    assert allowed in message
    # What the option means is the remedy.
    assert METHODS[method].options.model_fields[key].description in message


@pytest.mark.parametrize("name", ["sparse", 3, ["sketch"], None])
def test_an_unknown_method_is_refused_with_those_there_are(name):
    message = refusal({"method": name, "top_p": 2})
    assert f"method = {name!r}: there is no such method: choose from sketch, specattn, sts, vegas," in message


def test_a_bad_element_is_named_by_its_place():
    assert "dense_layers.1 = -1: Input should be greater than or equal to 0" in refusal(
        {"method": "sts", "dense_layers": [2, -1]}
    )
    assert "dense_layers.1 = 'last': " in refusal({"method": "sts", "dense_layers": [0, "last"]})


def test_all_problems_are_listed_at_once():
    message = refusal({"top_p": 2, "layer_map": "uniform", "top_q": 1})
    assert len(message.splitlines()) == 1 + 3
    for part in ("top_p = 2", "layer_map = 'uniform': method 'sketch' has no such option", "top_q: unknown"):
        assert part in message


@pytest.mark.parametrize("raw", [None, [], "top_p=0.9", 0.9, True])
def test_what_is_not_an_object_is_refused_with_an_example(raw):
    message = refusal(raw)
    assert f"is {raw!r}" in message
    assert 'it must be an object such as {"ratio": 0.125}' in message
    assert """--additional-config '{"specattn": {"ratio": 0.125}}'""" in message


def test_a_cap_below_the_floor_is_refused():
    message = refusal({"max_tokens": 100, "min_tokens": 101})
    assert "max_tokens 100 is below min_tokens 101: change one" in message


def test_a_cap_below_the_default_floor_is_refused_too():
    assert "max_tokens 100 is below min_tokens 128" in refusal({"max_tokens": 100})


def test_a_cap_below_what_is_always_kept_is_refused():
    message = refusal({"max_tokens": 20, "min_tokens": 0, "sink_tokens": 5, "recent_tokens": 16})
    assert "max_tokens 20 is below sink_tokens + recent_tokens (5 + 16)" in message
    assert "raise it or lower those" in message


def test_a_share_for_a_draft_that_reads_everything_is_refused():
    message = refusal({"sparse_draft": False, "draft_ratio": 0.25})
    assert "draft_ratio 0.25 without sparse_draft" in message
    assert "set sparse_draft=true, or leave draft_ratio out" in message


def test_a_shared_budget_without_a_budget_is_refused():
    message = refusal({"top_p": 0.9, "shared_budget": "layers"})
    assert "shared_budget 'layers' with a share of the attention (top_p)" in message
    assert "set ratio in the place of top_p, or leave shared_budget out" in message
    assert SpecAttnOptions.parse({"top_p": 0.9}).shared_budget == "layers"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"delta": 0.01}, "delta 0.01 without epsilon, the mass that may be lost: set epsilon too"),
        ({"delta": 0.01, "draws": 32}, "delta 0.01 and draws 32 without epsilon"),
        (
            {"epsilon": 0.1, "executor": "fa3"},
            "epsilon 0.1 with executor 'fa3', whose sparse attention cannot leave out",
        ),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": 1.0}, "epsilon"),
        ({"epsilon": 0.1, "draws": 65}, "draws"),
        ({"method": "specattn", "epsilon": 0.1}, "epsilon"),
    ],
    ids=str,
)
def test_a_guarantee_has_its_limit_and_a_method_that_keeps_it(given, message):
    assert message in refusal(given)


def test_a_guarantee_s_quantile_is_the_normal_one():
    promise = promise_of(SpecAttnOptions.parse({"epsilon": 0.1}))
    assert (promise.epsilon, promise.delta, promise.draws) == (0.1, 0.05, 64)
    assert promise.quantile == pytest.approx(1.645, abs=1e-3)
    assert promise_of(SpecAttnOptions.parse({})) is None


def test_what_full_attention_has_no_use_for_is_refused():
    message = refusal({"method": "dense", "ratio": 0.5, "min_tokens": 3, "executor": "torch"})
    assert "min_tokens, ratio without sparse_draft, where everything is read: set sparse_draft=true, or" in message
    message = refusal({"method": "dense", "sparse_draft": True, "ratio": 0.5, "min_tokens": 3, "draft_ratio": 0.2})
    assert "ratio beside draft_ratio, which stands in for it: leave one of them out" in message
    options = SpecAttnOptions.parse({"method": "dense", "sparse_draft": False, "executor": "torch"})
    assert not {"ratio", "crossover_tokens", "draft_ratio"} & options.usable


def test_a_cap_equal_to_the_floors_is_accepted():
    options = SpecAttnOptions.parse({"max_tokens": 20, "min_tokens": 20, "sink_tokens": 4, "recent_tokens": 16})
    assert options.max_tokens == 20


@pytest.mark.parametrize("option", ["ratio", "min_tokens", "sketch_bits", "crossover_tokens"])
def test_true_is_no_number(option):
    with pytest.raises(OptionsError, match=rf"{option} = True: true and false are no numbers"):
        SpecAttnOptions.parse({"method": "sketch", option: True})
    assert SpecAttnOptions.parse({"method": "sketch", "sparse_draft": False}).sparse_draft is False

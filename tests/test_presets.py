"""Presets: the settings of a paper, where nothing else is given."""

from __future__ import annotations

import pytest

from specattn_vllm.options import OptionsError, SpecAttnOptions
from specattn_vllm.selection.choose import Limits


@pytest.mark.parametrize("method", ["specattn", "sts", "vegas"])
def test_a_preset_sets_what_is_not_given(method):
    given = {"method": method}
    plain, preset = (SpecAttnOptions.parse(given | more).model_dump() for more in ({}, {"preset": "paper"}))
    changed = {key: value for key, value in preset.items() if value != plain[key]}
    assert (
        changed
        == {"preset": "paper"}
        | {
            "specattn": {
                "rule": "top_p",
                "top_p": 0.97,
                "combine": "union",
                "dense_layers": (0, 1),
                "min_tokens": 0,
                "sink_tokens": 0,
                "recent_tokens": 0,
            },
            "sts": {
                "rule": "top_k",
                "ratio": 1.0,
                "max_tokens": 256,
                "min_tokens": 0,
                "sink_tokens": 0,
                "recent_tokens": 0,
            },
            "vegas": {
                "rule": "top_k",
                "ratio": 0.07,
                "min_tokens": 256,
                "sink_tokens": 0,
                "recent_tokens": 0,
                "dilation": 0,
            },
        }[method]
    )


def test_a_preset_needs_a_method_that_was_published():
    with pytest.raises(OptionsError, match="set method to one of specattn, sts, vegas"):
        SpecAttnOptions.parse({"preset": "paper"})


def test_what_is_given_wins_over_a_preset():
    given = {"top_p": 0.9, "sink_tokens": 4, "dense_layers": [], "max_tokens": None}  # the defaults, but given
    options = SpecAttnOptions.parse({"method": "specattn", "preset": "paper", **given})
    assert (options.top_p, options.sink_tokens, options.dense_layers, options.max_tokens) == (0.9, 4, (), None)
    assert (options.combine, options.recent_tokens) == ("union", 0)


def test_a_preset_s_budget_is_a_number_of_tokens():
    limits = Limits.of(SpecAttnOptions.parse({"method": "sts", "preset": "paper"}))
    assert (limits.top_p, limits.max_fraction, limits.max_tokens, limits.min_tokens) == (1.0, 1.0, 256, 0)


def test_a_preset_s_budget_may_have_a_floor():
    """Vegas keeps 7% of the context and 256 tokens at least (arXiv 2602.07223)."""
    limits = Limits.of(SpecAttnOptions.parse({"method": "vegas", "preset": "paper"}))
    assert (limits.top_p, limits.max_fraction, limits.max_tokens, limits.min_tokens) == (1.0, 0.07, -1, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sts", "min_tokens": 300}, "max_tokens 256 is below min_tokens 300"),
        ({"method": "sparse"}, "method = 'sparse'"),
        ({"method": 3}, "method = 3"),
    ],
    ids=str,
)
def test_a_preset_does_not_get_around_the_checks(options, message):
    with pytest.raises(OptionsError, match=message):
        SpecAttnOptions.parse({"preset": "paper", **options})


def test_a_preset_without_a_choice_to_make_is_refused():
    for method in ("dense", "streamingllm"):
        with pytest.raises(OptionsError) as refused:
            SpecAttnOptions.parse({"method": method, "preset": "paper"})
        message = str(refused.value)
        assert f"preset = 'paper' sets how tokens are chosen, and method {method!r} has no such setting" in message
        assert "set method to one of specattn, sts, vegas" in message

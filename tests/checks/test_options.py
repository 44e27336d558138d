"""Options at start-up: without the backend, without effect, or wrong."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from specattn_vllm.checks import UnsupportedError
from specattn_vllm.layer_map import LayerMapError
from specattn_vllm.options import OptionsError


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


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"top_p": 0.5, "executor": "torch"}, "top_p"),
        ({"crossover_tokens": 5, "combine": "union", "min_tokens": 7}, "combine, crossover_tokens, min_tokens"),
        # Off, the draft reads everything too.
        ({"sparse_draft": False, "sink_tokens": 2, "stats_interval_s": 5}, "sink_tokens"),
        # On, the rule chooses for the draft: only what is about the target does nothing.
        (
            {"sparse_draft": True, "top_p": 0.5, "layer_map": "uniform", "dense_layers": [1], "combine": "union"},
            "combine, dense_layers, layer_map",
        ),
        ({"sparse_draft": True, "crossover_tokens": 5, "check_weights": False}, "check_weights"),
        ({"sparse_draft": True, "refresh_every": 4}, "refresh_every"),
        # A share for the draft stands in the place of the rule.
        (
            {"sparse_draft": True, "draft_ratio": 0.5, "top_p": 0.5, "max_fraction": 0.2, "max_tokens": 300},
            "max_fraction, top_p",
        ),
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
            {"method": "vegas", "layer_map": "uniform", "combine": "union", "dense_layers": [1], "refresh_every": 4}
            | {"check_weights": False, "sparse_draft": True, "audit_share": 0.5, "audit_floor": 0.8},
            "audit_floor, audit_share, check_weights, combine, dense_layers, layer_map, refresh_every, sparse_draft",
        ),
        (
            {"method": "streamingllm", "top_p": 0.5, "rule": "top_p", "dilation": 3, "ratio": 0.2},
            "dilation, rule, top_p",
        ),
        ({"method": "specattn", "dilation": 3}, "dilation"),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "idle",
)
def test_options_of_other_methods_are_named(configure, warnings, options, idle):
    draft = "target" if options["method"] in ("vegas", "streamingllm") else "draft"
    configure(options=options, draft=draft)
    assert [message.split("without effect: ")[1] for message in warnings] == [idle]


@pytest.mark.parametrize("options", [{"preset": "paper"}, {"dilation": 5, "crossover_tokens": 9}])
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
        {"top_p": 0.5, "sparse_draft": True, "combine": "union", "dense_layers": [1], "draft_ratio": 0.5},
        {"method": "sts", "sparse_draft": True, "rule": "top_k", "ratio": 0.2, "top_p": 0.5, "refresh_every": 4}
        | {"combine": "union", "layer_map": "uniform"},
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

"""What a target needs to draft for itself: made once, counted in full, handed to the target's metadata builder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.utils.import_utils import resolve_obj_by_qualname

from specattn_vllm import executors
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.target_capture import TargetCapture
from specattn_vllm.selection.window import Window
from specattn_vllm.speculation import self_wiring, wiring
from specattn_vllm.speculation.self_wiring import SelfSelection

CPU, META = torch.device("cpu"), torch.device("meta")
REQUESTS, LONGEST, HEADS, KV_HEADS, STEPS, LAYERS = 3, 70, 4, 2, 4, 5
ROW, WORDS = 128, 4  # LONGEST, rounded up to whole vectors
NAMES = [f"model.layers.{i}" for i in range(LAYERS)]


def prepared(
    monkeypatch, device=CPU, longest=LONGEST, requests=REQUESTS, names=NAMES, heads=HEADS, **options
) -> SelfSelection:
    layers = {name: SimpleNamespace(impl=SimpleNamespace(num_heads=heads, num_kv_heads=KV_HEADS)) for name in names}
    monkeypatch.setattr(self_wiring, "get_layers_from_vllm_config", lambda config, base: layers)
    found = SpecAttnOptions.parse(options)
    return self_wiring.prepare_self(
        SimpleNamespace(
            vllm_config=None,
            options=found,
            max_num_reqs=requests,
            max_model_len=longest,
            num_speculative_steps=STEPS,
            operations=executors.resolve("torch", CPU),
            device=device,
        ),
        resolve_obj_by_qualname(found.speculator).make_selection,
    )


def owned(*holders) -> list[torch.Tensor]:
    return [value for holder in holders for value in vars(holder).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("options", "dilation"),
    [
        ({}, STEPS + 1),
        ({"dilation": 0}, 0),
        ({"dilation": 4}, 4),
        ({"preset": "paper", "ratio": 0.2}, 0),
    ],
)
def test_vegas_captures_every_layer_of_the_target(monkeypatch, options, dilation):
    made = prepared(monkeypatch, **{"method": "vegas", "ratio": 0.2, **options})
    assert isinstance(made.source, TargetCapture)
    assert made.source.layer_sources == made.tables.layer_sources == {name: s for s, name in enumerate(NAMES)}
    assert made.source.max_query_len == STEPS + 1
    assert made.source.scores.shape == (REQUESTS, 2 * HEADS, ROW)
    assert made.source.mass.shape == (REQUESTS, LAYERS, 1, ROW)
    assert made.source.dilation == dilation
    # The share is a limit of the selection, the mean is over both rows and all heads.
    assert made.source.limits.max_fraction == 0.2
    assert made.source.weight == 1 / (2 * HEADS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "vegas"}, "reading ratio=0.1 of the context, dilation 5;"),
        ({"method": "vegas", "dilation": 0, "top_p": 0.8}, "reading top_p=0.8 of its attention, dilation 0;"),
        ({"method": "streamingllm"}, "reading ratio=0.1 of the context;"),
    ],
    ids=str,
)
def test_the_log_says_what_is_drafted_against(monkeypatch, options, told):
    lines = []
    monkeypatch.setattr(self_wiring.logger, "info", lambda message, *args: lines.append(message % args))
    prepared(monkeypatch, **options)
    assert f"drafts for itself, {STEPS} tokens per round, {told}" in lines[-1]


def test_streamingllm_has_one_table_for_all_layers(monkeypatch):
    made = prepared(monkeypatch, method="streamingllm")
    assert isinstance(made.source, Window)
    assert made.tables.layer_sources == dict.fromkeys(NAMES, 0)
    assert made.tables._page_table.shape == (1, REQUESTS, 1, ROW)


def test_tables_lie_in_the_mass_that_they_are_made_from(monkeypatch):
    made = prepared(monkeypatch, method="vegas")
    mass, tables = made.source.mass, made.tables._page_table
    assert tables.shape == (LAYERS, REQUESTS, 1, ROW)
    assert tables.data_ptr() == mass.data_ptr() and tables.nbytes == mass.nbytes
    assert "page tables" in made.nbytes and made.nbytes["page tables"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"method": "vegas"},
        {"method": "vegas", "dilation": 0},
        {"method": "streamingllm"},
    ],
    ids=str,
)
def test_everything_that_grows_with_the_context_is_counted(monkeypatch, options):
    made = prepared(monkeypatch, **options)
    memory = {tensor.data_ptr(): tensor.nbytes for tensor in owned(made.source, made.tables)}
    # What is not: lengths and the like, a few numbers per request and table.
    few = 8 * REQUESTS * (4 + LAYERS * KV_HEADS)
    assert 0 <= sum(memory.values()) - sum(made.nbytes.values()) <= few


def test_8_requests_of_128k_of_an_8b_model_take_less_than_300_mb(monkeypatch):
    """By its layers and heads, on no device."""
    names = [f"model.layers.{i}" for i in range(32)]
    made = prepared(monkeypatch, META, 131072, 8, names, heads=32, method="vegas")
    assert made.nbytes["scores"] == pytest.approx(2 * 32 * 8 * 131072 * 2, rel=0.01)  # bfloat16
    assert made.nbytes["mass"] == 4 * (32 + 1) * 8 * 131072  # of one layer also before it is spread
    assert sum(made.nbytes.values()) < 0.3e9


def test_what_is_too_large_is_refused_before_it_is_made(monkeypatch):
    made = []

    def refuse(nbytes, *others):
        made.append(nbytes)
        raise ValueError("too large")

    monkeypatch.setattr(wiring, "refuse_if_too_large", refuse)
    # Memory that no machine has.
    with pytest.raises(ValueError, match="too large"):
        prepared(monkeypatch, longest=2**30, requests=2**20, method="vegas")
    assert made[0]["mass"] == 4 * (LAYERS + 1) * 2**50


# Attaching


def test_the_capture_goes_to_the_builder_of_the_target_s_layers(monkeypatch):
    made = prepared(monkeypatch, method="vegas")
    cache = torch.zeros(3, 4, 2, 8).transpose(1, 2)
    layers = {name: SimpleNamespace(kv_cache=cache) for name in NAMES}
    monkeypatch.setattr(wiring, "get_layers_from_vllm_config", lambda config, base: layers)
    builder = SimpleNamespace(vllm_config=None, kv_cache_spec=SimpleNamespace(block_size=16), target_capture=None)
    made.attach([[SimpleNamespace(layer_names=NAMES, metadata_builders=[builder])]])
    assert builder.target_capture is made.source
    assert made.tables.block_size == 16
    assert made.tables.page_strides() == (8, 1, 2)
    # vLLM allocates the cache afterwards, and after profiling once more.
    layers[NAMES[0]].kv_cache = torch.zeros(3, 2, 4, 8)
    assert made.tables.page_strides() == (8, 4, 1)


def test_a_window_captures_nothing(monkeypatch):
    made = prepared(monkeypatch, method="streamingllm")
    layers = {name: SimpleNamespace(kv_cache=torch.zeros(3, 2, 4, 8)) for name in NAMES}
    monkeypatch.setattr(wiring, "get_layers_from_vllm_config", lambda config, base: layers)
    builder = SimpleNamespace(vllm_config=None, kv_cache_spec=SimpleNamespace(block_size=16), target_capture=None)
    made.attach([[SimpleNamespace(layer_names=NAMES, metadata_builders=[builder])]])
    assert builder.target_capture is None
    assert made.tables.page_strides() == (8, 4, 1)


def test_layers_in_several_attention_groups_are_refused(monkeypatch):
    made = prepared(monkeypatch, method="vegas")
    groups = [[SimpleNamespace(layer_names=[name]) for name in NAMES[:2]]]
    with pytest.raises(ValueError, match="one attention group, but vLLM made 2"):
        made.attach(groups)

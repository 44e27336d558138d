"""Maps and models for the tests of layer maps."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from specattn_vllm import layer_map
from specattn_vllm.fingerprint import ModelFacts


def make_facts(layers: int, **changes) -> ModelFacts:
    base = {
        "architecture": "LlamaForCausalLM",
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_size": 512,
        "vocab_size": 1000,
        "weights": f"digest of {layers} layers",
    }
    return ModelFacts(**(base | changes))


def make_content(**changes) -> dict:
    base = {
        "schema": "specattn-layer-map/1",
        "method": "specattn",
        "calibrated": True,
        "target": make_facts(4).model_dump(),
        "draft": make_facts(2).model_dump(),
        "layers": [None, 0, 1, 1],
        "provenance": {"tokens": 1000},
    }
    return base | changes


@pytest.fixture
def facts():
    """facts(layers, **changes) -> the facts of a model."""
    return make_facts


@pytest.fixture
def pair():
    """The models that `content` is a map of."""
    return SimpleNamespace(target=make_facts(4), draft=make_facts(2))


@pytest.fixture
def content():
    """content(**changes) -> a valid map as it stands in a file, with some keys changed."""
    return make_content


@pytest.fixture
def with_heads():
    """with_heads(**changes) -> the same with a map of heads."""
    return lambda **changes: make_content(method="sts", heads=[None, [0, 1], [1, 1], [1, 0]], **changes)


@pytest.fixture
def of_shapes():
    """of_shapes(**changes) -> a map of no weights, that nothing was measured for."""
    unknown = {name: make_facts(layers, weights=None).model_dump() for name, layers in (("target", 4), ("draft", 2))}
    made = {"calibrated": False, "layers": [None, 0, 0, 1], "provenance": {"made": "uniform"}}
    return lambda **changes: make_content(**(unknown | made | changes))


@pytest.fixture
def write(tmp_path):
    """write(content, name): a map file."""

    def to_file(what, name="map.json"):
        path = tmp_path / name
        path.write_text(what if isinstance(what, str) else json.dumps(what))
        return path

    return to_file


@pytest.fixture(autouse=True)
def no_shipped_maps(monkeypatch):
    """The maps of the package are data of their own; here they would only be in the way."""
    monkeypatch.setattr(layer_map, "shipped", dict)

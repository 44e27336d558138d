"""Layer maps at start-up: made for other models, not there, or with nothing to prune."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from specattn_vllm import layer_map
from specattn_vllm.fingerprint import fingerprint
from specattn_vllm.layer_map import LayerMapError
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.speculation.maps import model_facts, resolve_layer_map

# On other platforms vLLM itself refuses more processes than there are devices.
cpu_only = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM counts devices on other platforms")


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
    configure(options={"method": "sts"})
    with pytest.raises(LayerMapError, match="tensor_parallel_size = 2 does not divide the 1 KV heads of the target"):
        configure(options={"method": "sts"}, tensor_parallel_size=2)


@pytest.mark.parametrize("name", ["target", "windowed", "bare"])
def test_an_engine_sees_the_facts_that_a_fingerprint_wrote(configure, models, name):
    """Maps are made from a folder and checked against vLLM's configuration: both have to read it alike."""
    config = configure(target=name, draft=name, backend=None)
    facts = fingerprint(models[name])
    assert model_facts(config.model_config).model_dump() == facts
    assert model_facts(config.speculative_config.draft_model_config).model_dump() == facts
    assert (facts["weights"] is not None) == (name == "bare")

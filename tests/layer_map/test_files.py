"""Files of layer maps: what is read, and what is refused."""

from __future__ import annotations

import pytest

from specattn_vllm import layer_map
from specattn_vllm.layer_map import LayerMapError, read


def refusal(path) -> str:
    with pytest.raises(LayerMapError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_map_survives_a_file(write, content, pair):
    once = read(write(content()))
    assert once.layers == (None, 0, 1, 1)
    assert (once.target, once.draft, once.provenance) == (pair.target, pair.draft, {"tokens": 1000})
    assert read(write(once.model_dump(by_alias=True), "again.json")) == once


def test_the_key_in_the_file_is_schema(write, content):
    assert read(write(content())).schema_ == layer_map.SCHEMA
    without = content()
    del without["schema"]
    assert "schema: Field required" in refusal(write(without))


def test_another_schema_version_is_refused_with_the_known_one(write, content):
    message = refusal(write(content(schema="specattn-layer-map/2")))
    assert "is not valid (specattn-layer-map/1)" in message
    assert "schema: Input should be 'specattn-layer-map/1'" in message


def test_malformed_json_is_refused(write):
    assert "Invalid JSON" in refusal(write('{"schema": "specattn-layer-map/1",'))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    # For example the weights, given by mistake.
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x80\xff\x00\x01")
    assert "is not valid" in refusal(path)


def test_an_unknown_key_is_refused(write, content):
    assert "layer: Extra inputs are not permitted" in refusal(write(content(layer=[0])))


@pytest.mark.parametrize(
    ("older", "named"),
    [
        ({"shares": [None, 0.5, 0.5, 2.0], "induction": None}, "keys of an older version: shares, induction."),
        ({"induction": [False, True, False, False]}, "keys of an older version: induction."),
        ({"shares": None}, "keys of an older version: shares."),
    ],
)
def test_keys_of_older_maps_are_refused_with_the_remedy(write, older, named, content):
    message = refusal(write(content(**older)))
    assert named in message
    assert "Delete them from the file, or make the map anew (specattn calibrate)" in message
    assert "Value error" not in message
    assert read(write(content(), "without.json")).layers == (None, 0, 1, 1)


def test_an_unknown_fact_is_refused(write, content, pair):
    target = pair.target.model_dump() | {"quantization": "int4"}
    assert "target.quantization: Extra inputs" in refusal(write(content(target=target)))


def test_all_problems_of_a_file_are_listed(write, content):
    message = refusal(write(content(method="magic", calibrated="perhaps")))
    assert "method: " in message
    assert "calibrated: " in message


@pytest.mark.parametrize("layers", [[None, 0, 1], [None, 0, 1, 1, 1]])
def test_one_entry_per_target_layer(write, layers, content):
    assert f"layers has {len(layers)} entries for 4 target layers" in refusal(write(content(layers=layers)))


@pytest.mark.parametrize(("layers", "place"), [([None, 0, 2, 1], "layers[2] = 2"), ([-1, 0, 1, 1], "layers[0] = -1")])
def test_a_layer_the_draft_does_not_have_is_refused(write, layers, place, content):
    assert f"{place}, but the draft has layers 0 to 1" in refusal(write(content(layers=layers)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": None}, "a map for method 'sts' has layers and heads, not layers"),
        ({"method": "specattn"}, "a map for method 'specattn' has layers, not layers and heads"),
        ({"heads": [None, [0, 1], [1, 1]]}, "heads has 3 entries for 4 target layers"),
        ({"heads": [[0, 0], [0, 1], [1, 1], [1, 0]]}, "heads[0] = (0, 0), but layers[0] = None: null goes with null"),
        ({"heads": [None, None, [1, 1], [1, 0]]}, "heads[1] = None, but layers[1] = 0: null goes with null"),
        ({"heads": [None, [0, 1], [1, 1], [1, 0, 0]]}, "heads[3] has 3 entries for 2 target KV heads"),
        ({"heads": [None, [0, 1], [1, 1], [1, 2]]}, "heads[3][1] = 2, but the draft has KV heads 0 to 1"),
        ({"heads": [None, [0, 1], [1, 1], [-1, 1]]}, "heads[3][0] = -1, but the draft has KV heads 0 to 1"),
    ],
)
def test_a_head_map_that_does_not_fit_is_refused(write, changes, message, with_heads):
    assert message in refusal(write(with_heads() | changes))


def test_a_missing_file_is_refused_with_what_could_be_given(tmp_path, monkeypatch):
    path = tmp_path / "nowhere.json"
    assert "shipped map: none" in refusal(path)
    monkeypatch.setattr(layer_map, "shipped", lambda: {"pair-a": tmp_path, "pair-b": tmp_path})
    message = refusal(path)
    assert "cannot be read (No such file or directory)" in message
    assert "path of a JSON file, 'uniform', or a shipped map: pair-a, pair-b" in message

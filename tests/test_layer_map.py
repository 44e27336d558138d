"""Layer maps and the model facts they are checked against."""

from __future__ import annotations

import json

import pytest

from specattn_vllm import layer_map
from specattn_vllm.calibrate.uniform import PAIRS, map_text
from specattn_vllm.cli import demo_folder
from specattn_vllm.fingerprint import ModelFacts, fingerprint
from specattn_vllm.layer_map import LayerMap, LayerMapError, read, resolve, uniform


def facts(layers: int, **changes) -> ModelFacts:
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


TARGET, DRAFT = facts(4), facts(2)


def content(**changes) -> dict:
    """A valid map as it stands in a file, with some keys changed."""
    base = {
        "schema": "specattn-layer-map/1",
        "method": "specattn",
        "calibrated": True,
        "target": TARGET.model_dump(),
        "draft": DRAFT.model_dump(),
        "layers": [None, 0, 1, 1],
        "provenance": {"tokens": 1000},
    }
    return base | changes


HEADS = [None, [0, 1], [1, 1], [1, 0]]


def with_heads(**changes) -> dict:
    return content(method="sts", heads=HEADS, **changes)


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


def refusal(path) -> str:
    with pytest.raises(LayerMapError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Files


def test_a_map_survives_a_file(write):
    once = read(write(content()))
    assert once.layers == (None, 0, 1, 1)
    assert (once.target, once.draft, once.provenance) == (TARGET, DRAFT, {"tokens": 1000})
    assert read(write(once.model_dump(by_alias=True), "again.json")) == once


def test_the_key_in_the_file_is_schema(write):
    assert read(write(content())).schema_ == layer_map.SCHEMA
    without = content()
    del without["schema"]
    assert "schema: Field required" in refusal(write(without))


def test_another_schema_version_is_refused_with_the_known_one(write):
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


def test_an_unknown_key_is_refused(write):
    assert "layer: Extra inputs are not permitted" in refusal(write(content(layer=[0])))


@pytest.mark.parametrize(
    ("older", "named"),
    [
        ({"shares": [None, 0.5, 0.5, 2.0], "induction": None}, "keys of an older version: shares, induction."),
        ({"induction": [False, True, False, False]}, "keys of an older version: induction."),
        ({"shares": None}, "keys of an older version: shares."),
    ],
)
def test_keys_of_older_maps_are_refused_with_the_remedy(write, older, named):
    message = refusal(write(content(**older)))
    assert named in message
    assert "Delete them from the file, or make the map anew (specattn calibrate)" in message
    assert "Value error" not in message
    assert read(write(content(), "without.json")).layers == (None, 0, 1, 1)


def test_an_unknown_fact_is_refused(write):
    target = TARGET.model_dump() | {"quantization": "int4"}
    assert "target.quantization: Extra inputs" in refusal(write(content(target=target)))


def test_all_problems_of_a_file_are_listed(write):
    message = refusal(write(content(method="magic", calibrated="perhaps")))
    assert "method: " in message
    assert "calibrated: " in message


@pytest.mark.parametrize("layers", [[None, 0, 1], [None, 0, 1, 1, 1]])
def test_one_entry_per_target_layer(write, layers):
    assert f"layers has {len(layers)} entries for 4 target layers" in refusal(write(content(layers=layers)))


@pytest.mark.parametrize(("layers", "place"), [([None, 0, 2, 1], "layers[2] = 2"), ([-1, 0, 1, 1], "layers[0] = -1")])
def test_a_layer_the_draft_does_not_have_is_refused(write, layers, place):
    assert f"{place}, but the draft has layers 0 to 1" in refusal(write(content(layers=layers)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": None}, "a map for method 'sts' has layers and heads, not layers"),
        ({"method": "specattn"}, "a map for method 'specattn' has layers, not layers and heads"),
        ({"heads": HEADS[:3]}, "heads has 3 entries for 4 target layers"),
        ({"heads": [[0, 0], *HEADS[1:]]}, "heads[0] = (0, 0), but layers[0] = None: null goes with null"),
        ({"heads": [None, None, *HEADS[2:]]}, "heads[1] = None, but layers[1] = 0: null goes with null"),
        ({"heads": [*HEADS[:3], [1, 0, 0]]}, "heads[3] has 3 entries for 2 target KV heads"),
        ({"heads": [*HEADS[:3], [1, 2]]}, "heads[3][1] = 2, but the draft has KV heads 0 to 1"),
        ({"heads": [*HEADS[:3], [-1, 1]]}, "heads[3][0] = -1, but the draft has KV heads 0 to 1"),
    ],
)
def test_a_head_map_that_does_not_fit_is_refused(write, changes, message):
    assert message in refusal(write(with_heads() | changes))


def test_a_missing_file_is_refused_with_what_could_be_given(tmp_path, monkeypatch):
    path = tmp_path / "nowhere.json"
    assert "shipped map: none" in refusal(path)
    monkeypatch.setattr(layer_map, "shipped", lambda: {"pair-a": tmp_path, "pair-b": tmp_path})
    message = refusal(path)
    assert "cannot be read (No such file or directory)" in message
    assert "path of a JSON file, 'uniform', or a shipped map: pair-a, pair-b" in message


# Which map an engine uses


def test_a_map_is_found_by_path(write):
    path = write(content())
    assert resolve(str(path), TARGET, DRAFT) == read(path)


def test_a_map_is_found_by_its_shipped_name(write, monkeypatch):
    path = write(content())
    monkeypatch.setattr(layer_map, "shipped", lambda: {"pair": path})
    assert resolve("pair", TARGET, DRAFT) == read(path)


@pytest.mark.parametrize("field", [name for name in ModelFacts.model_fields if name != "weights"])
@pytest.mark.parametrize("side", ["target", "draft"])
def test_a_map_for_another_model_is_refused_and_the_difference_named(write, field, side):
    served = {"target": TARGET, "draft": DRAFT}
    ours = getattr(served[side], field)
    theirs = "MistralForCausalLM" if field == "architecture" else ours + 1
    served[side] = served[side].model_copy(update={field: theirs})
    with pytest.raises(LayerMapError) as caught:
        resolve(str(write(content())), served["target"], served["draft"])
    message = str(caught.value)
    assert "was made for other models (map != served)" in message
    assert f"{side} {field}: {ours} != {theirs}. " in message
    assert "layer_map='uniform'" in message


def test_every_difference_is_named(write):
    target = facts(4, hidden_size=1024, vocab_size=5)
    with pytest.raises(LayerMapError) as caught:
        resolve(str(write(content())), target, facts(2, architecture="X"))
    for part in ("target hidden_size", "target vocab_size", "draft architecture"):
        assert part in str(caught.value)


@pytest.mark.parametrize("side", ["target", "draft"])
def test_other_weights_are_refused_unless_the_map_names_none(write, side):
    served = {"target": TARGET, "draft": DRAFT}
    served[side] = served[side].model_copy(update={"weights": "another fine-tune"})
    path = str(write(content()))
    with pytest.raises(LayerMapError, match=f"{side} weights: .* != another fine-tune.*a copy of it with weights null"):
        resolve(path, served["target"], served["draft"])
    known = {"target": TARGET, "draft": DRAFT}
    unbound = write(content(**{side: known[side].model_copy(update={"weights": None}).model_dump()}), "unbound.json")
    assert resolve(str(unbound), served["target"], served["draft"]).layers == (None, 0, 1, 1)


def test_a_map_for_another_method_is_refused(write):
    path = write(with_heads())
    with pytest.raises(LayerMapError, match=r"made for method 'sts', but method = 'specattn' takes .*'uniform'"):
        resolve(str(path), TARGET, DRAFT, method="specattn")
    # A control run differs from what it controls by its method alone.
    for method in ("dense", "sts"):
        assert resolve(str(path), TARGET, DRAFT, method=method) == read(path)


@pytest.mark.parametrize("method", ["specattn", "sts", "dense"])
def test_a_map_without_heads_serves_every_method(write, method):
    path = write(content())
    assert resolve(str(path), TARGET, DRAFT, method=method) == read(path)


def test_unknown_weights_differ_from_nothing(write):
    unknown = TARGET.model_copy(update={"weights": None})
    assert resolve(str(write(content())), unknown, DRAFT).calibrated
    assert resolve(str(write(content(target=unknown.model_dump()))), TARGET, DRAFT).calibrated


def test_by_default_a_shipped_map_for_exactly_these_models_is_used(write, monkeypatch):
    maps = {
        "other target": write(content(target=facts(4, hidden_size=1024).model_dump()), "a.json"),
        "other draft": write(content(draft=facts(2, hidden_size=1024).model_dump()), "b.json"),
        "these": write(content(), "c.json"),
    }
    monkeypatch.setattr(layer_map, "shipped", lambda: maps)
    assert resolve(None, TARGET, DRAFT) == read(maps["these"])


@pytest.mark.parametrize("order", [1, -1])
def test_by_default_the_map_that_fits_the_method_best_is_used(write, monkeypatch, order):
    maps = [("layers", write(content(), "a.json")), ("heads", write(with_heads(), "b.json"))][::order]
    monkeypatch.setattr(layer_map, "shipped", lambda: dict(maps))
    assert {method: resolve(None, TARGET, DRAFT, method=method).method for method in ("specattn", "sts", "dense")} == {
        "specattn": "specattn",
        "sts": "sts",
        "dense": "specattn",
    }
    monkeypatch.setattr(layer_map, "shipped", lambda: {"layers": dict(maps)["layers"]})
    assert resolve(None, TARGET, DRAFT, method="sts") == read(dict(maps)["layers"])
    monkeypatch.setattr(layer_map, "shipped", lambda: {"heads": dict(maps)["heads"]})
    assert resolve(None, TARGET, DRAFT, method="specattn") == uniform(TARGET, DRAFT)


@pytest.mark.parametrize("weights", ["another fine-tune", None])
def test_by_default_no_map_of_other_or_unknown_weights_is_used(write, monkeypatch, weights):
    path = write(content())
    monkeypatch.setattr(layer_map, "shipped", lambda: {"pair": path})
    served = TARGET.model_copy(update={"weights": weights})
    assert resolve(None, served, DRAFT) == uniform(served, DRAFT)


def of_shapes(**changes) -> dict:
    """A map of no weights, that nothing was measured for."""
    unknown = {"target": facts(4, weights=None).model_dump(), "draft": facts(2, weights=None).model_dump()}
    return content(calibrated=False, layers=[None, 0, 0, 1], provenance={"made": "uniform"}, **(unknown | changes))


@pytest.mark.parametrize("weights", ["a fine-tune", None])
def test_by_default_a_shipped_map_of_shapes_is_used_for_all_their_weights(write, monkeypatch, weights):
    path = write(of_shapes())
    monkeypatch.setattr(layer_map, "shipped", lambda: {"shapes": path})
    target, draft = (found.model_copy(update={"weights": weights}) for found in (TARGET, DRAFT))
    assert resolve(None, target, draft) == read(path) != uniform(target, draft)
    assert resolve(None, facts(4, hidden_size=1024), draft).provenance == {}
    assert resolve(None, target, facts(2, num_key_value_heads=4)).provenance == {}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("method", ["specattn", "sts", "dense"])
def test_a_calibrated_map_goes_before_one_of_shapes(write, monkeypatch, method, order):
    """Whatever it has heads for, and whichever is read first; and what is named goes before both."""
    maps = {
        "shapes": write(of_shapes(), "a.json"),
        "shapes with heads": write(of_shapes(method="sts", heads=[None, [0, 1], [0, 1], [0, 1]]), "b.json"),
        "calibrated": write(content(), "c.json"),
    }
    monkeypatch.setattr(layer_map, "shipped", lambda: dict([*maps.items()][::order]))
    assert resolve(None, TARGET, DRAFT, method=method) == read(maps["calibrated"])
    mine = write(content(layers=[None, 1, 1, 1]), "mine.json")
    assert resolve(str(mine), TARGET, DRAFT, method=method) == read(mine)
    # On weights that it was not calibrated on, it says nothing.
    other = TARGET.model_copy(update={"weights": "a fine-tune"})
    assert not resolve(None, other, DRAFT, method=method).calibrated


def test_the_file_of_a_shipped_map_is_known_after_layers_were_made_dense(write, monkeypatch):
    maps = {"shapes": write(of_shapes(), "a.json"), "calibrated": write(content(), "b.json")}
    monkeypatch.setattr(layer_map, "shipped", lambda: maps)
    for path in maps.values():
        assert layer_map.shipped_file(read(path).with_dense((1, 3))) == path
    assert layer_map.shipped_file(uniform(TARGET, DRAFT)) is None
    assert layer_map.shipped_file(uniform(facts(4, weights=None), facts(2, weights=None))) is None


def test_by_default_uniform_where_nothing_is_shipped():
    assert resolve(None, TARGET, DRAFT) == uniform(TARGET, DRAFT)


def test_uniform_can_be_asked_for_where_a_map_is_shipped(write, monkeypatch):
    path = write(content())
    monkeypatch.setattr(layer_map, "shipped", lambda: {"pair": path})
    assert resolve("uniform", TARGET, DRAFT) == uniform(TARGET, DRAFT)


def test_what_the_package_ships_is_valid_and_under_the_name_of_its_file(monkeypatch):
    monkeypatch.undo()
    for name, path in layer_map.shipped().items():
        assert path.name == f"{name}.json"
        found = read(path)
        assert resolve(name, found.target, found.draft, method=found.method) == found


@pytest.mark.parametrize("name", PAIRS)
def test_maps_of_public_pairs_are_what_makes_them_and_say_what_they_are(monkeypatch, name):
    monkeypatch.undo()
    path = layer_map.shipped()[name]
    assert path.read_text() == map_text(PAIRS[name])
    found = read(path)
    assert not found.calibrated and found.provenance["made"].startswith("uniform, not calibrated")
    target, draft = PAIRS[name].models[0]
    assert found.provenance["calibrate"].startswith(f"specattn calibrate --target {target} --draft {draft} --text ")
    # An engine finds it by the models' configurations, whose weights may be in a folder or not.
    for weights in (None, "digest"):
        served = (side.model_copy(update={"weights": weights}) for side in (found.target, found.draft))
        assert resolve(None, *served, method="sts") == found


def test_every_shipped_map_is_calibrated_or_of_a_known_pair(monkeypatch):
    monkeypatch.undo()
    plain = {name for name, path in layer_map.shipped().items() if not read(path).calibrated}
    assert plain == {*PAIRS}


@pytest.mark.parametrize(("method", "name"), [("specattn", "demo"), ("sts", "demo-sts"), ("dense", "demo")])
def test_the_demo_pair_has_a_map_for_each_method(monkeypatch, method, name):
    monkeypatch.undo()
    target, draft = (ModelFacts(**fingerprint(demo_folder(role))) for role in ("target", "draft"))
    assert resolve(None, target, draft, method=method) == read(layer_map.shipped()[name])


# What a map says


@pytest.mark.parametrize("m", [1, 2, 5, 16, 28, 32, 33])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 40])
def test_uniform_pairs_by_depth(m, n):
    found = uniform(facts(m), facts(n))
    assert not found.calibrated
    assert found.layers[0] is None
    rest = list(found.layers[1:])
    assert len(rest) == m - 1
    assert all(0 <= i < n for i in rest)
    assert rest == sorted(rest)
    # Relative depths agree to within a draft layer.
    assert all(abs(i / n - j / m) <= 1 / n for j, i in enumerate(rest, start=1))


def test_dense_layers_are_taken_out():
    found = uniform(TARGET, DRAFT)
    assert found.layers == (None, 0, 1, 1)
    assert found.with_dense((3, 1)).layers == (None, None, 1, None)
    assert found.with_dense(()).layers == found.layers
    assert found.layers == (None, 0, 1, 1), "the map itself stays"


def test_dense_layers_are_taken_out_of_the_head_map_too():
    found = LayerMap.model_validate(with_heads()).with_dense((3, 1))
    assert (found.layers, found.heads) == ((None, None, 1, None), (None, None, (1, 1), None))


def test_a_dense_layer_the_target_does_not_have_is_refused():
    with pytest.raises(LayerMapError, match="dense_layers contains 4, but the target has layers 0 to 3: remove it"):
        uniform(TARGET, DRAFT).with_dense((1, 4))


def test_sources_are_the_captured_draft_layers_ascending():
    found = LayerMap.model_validate(content(draft=facts(5).model_dump(), layers=[4, None, 2, 4]))
    assert found.sources == (2, 4)
    assert found.with_dense((2,)).sources == (4,)
    assert found.with_dense((0, 2, 3)).sources == ()


# Heads on ranks


def paired(ours: int, theirs: int, heads=None) -> LayerMap:
    """Target layers 1 and 2 are mapped; `heads`: the map of both."""
    changes = {} if heads is None else {"method": "sts", "heads": [None, heads, heads]}
    target, draft = facts(3, num_key_value_heads=ours), facts(2, num_key_value_heads=theirs)
    layers = [None, 0, 1]
    return LayerMap.model_validate(
        content(target=target.model_dump(), draft=draft.model_dump(), layers=layers, **changes)
    )


def test_one_rank_has_the_whole_map():
    assert paired(3, 2, [1, 0, 1]).local_heads(0, 1) == (None, (1, 0, 1), (1, 0, 1))


@pytest.mark.parametrize(("ours", "theirs"), [(8, 8), (8, 4), (4, 8), (8, 2), (2, 8), (6, 4)])
def test_heads_paired_by_proportion_are_on_the_same_rank(ours, theirs):
    found = paired(ours, theirs)
    [whole] = {row for row in found.local_heads(0, 1) if row is not None}
    assert whole == tuple(h * theirs // ours for h in range(ours))
    ranks = [found.local_heads(rank, 2)[1] for rank in range(2)]
    assert ranks[0] + tuple(g + theirs // 2 for g in ranks[1]) == whole


def test_a_rank_numbers_its_own_heads():
    found = paired(4, 4, [1, 1, 2, 3])
    assert found.local_heads(0, 2) == (None, (1, 1), (1, 1))
    assert found.local_heads(1, 2) == (None, (0, 1), (0, 1))


@pytest.mark.parametrize(
    ("ours", "theirs", "side", "count"), [(3, 2, "target", 3), (4, 3, "draft", 3), (1, 2, "target", 1)]
)
def test_heads_that_do_not_divide_among_the_ranks_are_refused(ours, theirs, side, count):
    with pytest.raises(LayerMapError, match=f"parallel_size = 2 does not divide the {count} KV heads of the {side}"):
        paired(ours, theirs).local_heads(0, 2)


def test_a_head_of_another_rank_is_refused_with_the_remedy():
    found = paired(4, 4, [0, 2, 2, 3])
    assert found.local_heads(1, 2) == (None, (0, 1), (0, 1))
    message = r"heads\[1\]\[1\] = 2 of the layer map.*within each rank.*layer_map='uniform'"
    with pytest.raises(LayerMapError, match=message):
        found.local_heads(0, 2)

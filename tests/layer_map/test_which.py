"""Which layer map an engine uses."""

from __future__ import annotations

import pytest

from specattn_vllm import layer_map
from specattn_vllm.calibrate.uniform import PAIRS, map_text
from specattn_vllm.fingerprint import ModelFacts, fingerprint
from specattn_vllm.installed import demo_folder
from specattn_vllm.layer_map import LayerMapError, read, resolve, uniform


def test_a_map_is_found_by_path(write, content, pair):
    path = write(content())
    assert resolve(str(path), pair.target, pair.draft) == read(path)


def test_a_map_is_found_by_its_shipped_name(write, monkeypatch, content, pair):
    path = write(content())
    monkeypatch.setattr(layer_map, "shipped", lambda: {"pair": path})
    assert resolve("pair", pair.target, pair.draft) == read(path)


@pytest.mark.parametrize("field", [name for name in ModelFacts.model_fields if name != "weights"])
@pytest.mark.parametrize("side", ["target", "draft"])
def test_a_map_for_another_model_is_refused_and_the_difference_named(write, field, side, content, pair):
    served = {"target": pair.target, "draft": pair.draft}
    ours = getattr(served[side], field)
    theirs = "MistralForCausalLM" if field == "architecture" else ours + 1
    served[side] = served[side].model_copy(update={field: theirs})
    with pytest.raises(LayerMapError) as caught:
        resolve(str(write(content())), served["target"], served["draft"])
    message = str(caught.value)
    assert "was made for other models (map != served)" in message
    assert f"{side} {field}: {ours} != {theirs}. " in message
    assert "layer_map='uniform'" in message


def test_every_difference_is_named(write, facts, content):
    target = facts(4, hidden_size=1024, vocab_size=5)
    with pytest.raises(LayerMapError) as caught:
        resolve(str(write(content())), target, facts(2, architecture="X"))
    for part in ("target hidden_size", "target vocab_size", "draft architecture"):
        assert part in str(caught.value)


@pytest.mark.parametrize("side", ["target", "draft"])
def test_other_weights_are_refused_unless_the_map_names_none(write, side, content, pair):
    served = {"target": pair.target, "draft": pair.draft}
    served[side] = served[side].model_copy(update={"weights": "another fine-tune"})
    path = str(write(content()))
    with pytest.raises(LayerMapError, match=f"{side} weights: .* != another fine-tune.*a copy of it with weights null"):
        resolve(path, served["target"], served["draft"])
    known = {"target": pair.target, "draft": pair.draft}
    unbound = write(content(**{side: known[side].model_copy(update={"weights": None}).model_dump()}), "unbound.json")
    assert resolve(str(unbound), served["target"], served["draft"]).layers == (None, 0, 1, 1)


def test_a_map_for_another_method_is_refused(write, with_heads, pair):
    path = write(with_heads())
    with pytest.raises(LayerMapError, match=r"made for method 'sts', but method = 'specattn' takes .*'uniform'"):
        resolve(str(path), pair.target, pair.draft, method="specattn")
    # A control run differs from what it controls by its method alone.
    for method in ("dense", "sts"):
        assert resolve(str(path), pair.target, pair.draft, method=method) == read(path)


@pytest.mark.parametrize("method", ["specattn", "sts", "dense"])
def test_a_map_without_heads_serves_every_method(write, method, content, pair):
    path = write(content())
    assert resolve(str(path), pair.target, pair.draft, method=method) == read(path)


def test_unknown_weights_differ_from_nothing(write, content, pair):
    unknown = pair.target.model_copy(update={"weights": None})
    assert resolve(str(write(content())), unknown, pair.draft).calibrated
    assert resolve(str(write(content(target=unknown.model_dump()))), pair.target, pair.draft).calibrated


def test_by_default_a_shipped_map_for_exactly_these_models_is_used(write, monkeypatch, facts, content, pair):
    maps = {
        "other target": write(content(target=facts(4, hidden_size=1024).model_dump()), "a.json"),
        "other draft": write(content(draft=facts(2, hidden_size=1024).model_dump()), "b.json"),
        "these": write(content(), "c.json"),
    }
    monkeypatch.setattr(layer_map, "shipped", lambda: maps)
    assert resolve(None, pair.target, pair.draft) == read(maps["these"])


@pytest.mark.parametrize("order", [1, -1])
def test_by_default_the_map_that_fits_the_method_best_is_used(write, monkeypatch, order, content, with_heads, pair):
    maps = [("layers", write(content(), "a.json")), ("heads", write(with_heads(), "b.json"))][::order]
    monkeypatch.setattr(layer_map, "shipped", lambda: dict(maps))
    assert {
        method: resolve(None, pair.target, pair.draft, method=method).method for method in ("specattn", "sts", "dense")
    } == {
        "specattn": "specattn",
        "sts": "sts",
        "dense": "specattn",
    }
    monkeypatch.setattr(layer_map, "shipped", lambda: {"layers": dict(maps)["layers"]})
    assert resolve(None, pair.target, pair.draft, method="sts") == read(dict(maps)["layers"])
    monkeypatch.setattr(layer_map, "shipped", lambda: {"heads": dict(maps)["heads"]})
    assert resolve(None, pair.target, pair.draft, method="specattn") == uniform(pair.target, pair.draft)


@pytest.mark.parametrize("weights", ["another fine-tune", None])
def test_by_default_no_map_of_other_or_unknown_weights_is_used(write, monkeypatch, weights, content, pair):
    path = write(content())
    monkeypatch.setattr(layer_map, "shipped", lambda: {"pair": path})
    served = pair.target.model_copy(update={"weights": weights})
    assert resolve(None, served, pair.draft) == uniform(served, pair.draft)


@pytest.mark.parametrize("weights", ["a fine-tune", None])
def test_by_default_a_shipped_map_of_shapes_is_used_for_all_their_weights(
    write, monkeypatch, weights, facts, of_shapes, pair
):
    path = write(of_shapes())
    monkeypatch.setattr(layer_map, "shipped", lambda: {"shapes": path})
    target, draft = (found.model_copy(update={"weights": weights}) for found in (pair.target, pair.draft))
    assert resolve(None, target, draft) == read(path) != uniform(target, draft)
    assert resolve(None, facts(4, hidden_size=1024), draft).provenance == {}
    assert resolve(None, target, facts(2, num_key_value_heads=4)).provenance == {}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("method", ["specattn", "sts", "dense"])
def test_a_calibrated_map_goes_before_one_of_shapes(write, monkeypatch, method, order, content, of_shapes, pair):
    """Whatever it has heads for, and whichever is read first; and what is named goes before both."""
    maps = {
        "shapes": write(of_shapes(), "a.json"),
        "shapes with heads": write(of_shapes(method="sts", heads=[None, [0, 1], [0, 1], [0, 1]]), "b.json"),
        "calibrated": write(content(), "c.json"),
    }
    monkeypatch.setattr(layer_map, "shipped", lambda: dict([*maps.items()][::order]))
    assert resolve(None, pair.target, pair.draft, method=method) == read(maps["calibrated"])
    mine = write(content(layers=[None, 1, 1, 1]), "mine.json")
    assert resolve(str(mine), pair.target, pair.draft, method=method) == read(mine)
    # On weights that it was not calibrated on, it says nothing.
    other = pair.target.model_copy(update={"weights": "a fine-tune"})
    assert not resolve(None, other, pair.draft, method=method).calibrated


def test_the_file_of_a_shipped_map_is_known_after_layers_were_made_dense(
    write, monkeypatch, facts, content, of_shapes, pair
):
    maps = {"shapes": write(of_shapes(), "a.json"), "calibrated": write(content(), "b.json")}
    monkeypatch.setattr(layer_map, "shipped", lambda: maps)
    for path in maps.values():
        assert layer_map.shipped_file(read(path).with_dense((1, 3))) == path
    assert layer_map.shipped_file(uniform(pair.target, pair.draft)) is None
    assert layer_map.shipped_file(uniform(facts(4, weights=None), facts(2, weights=None))) is None


def test_by_default_uniform_where_nothing_is_shipped(pair):
    assert resolve(None, pair.target, pair.draft) == uniform(pair.target, pair.draft)


def test_uniform_can_be_asked_for_where_a_map_is_shipped(write, monkeypatch, content, pair):
    path = write(content())
    monkeypatch.setattr(layer_map, "shipped", lambda: {"pair": path})
    assert resolve("uniform", pair.target, pair.draft) == uniform(pair.target, pair.draft)


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

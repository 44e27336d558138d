"""Options, request arguments and map files from anybody: each is taken, or refused with a message that is ours."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_vllm import data_file, layer_map, request
from specattn_vllm.layer_map import LayerMap, LayerMapError
from specattn_vllm.methods import METHODS
from specattn_vllm.options import OptionsError, SpecAttnOptions

KEYS = sorted({key for method in METHODS.values() for key in method.options.model_fields})
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 0.5, 1.0, 2**31, 2**63, 1e308, -0.0])
SCALARS = (
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20) | st.sampled_from([*METHODS, "paper", "top_p", "auto"])
)
JSON = st.recursive(SCALARS, lambda of: st.lists(of, max_size=4) | st.dictionaries(st.text(max_size=8), of, max_size=4))
NAMES = st.sampled_from([*KEYS, "specattn", "spec_attn", "Specattn", "method "]) | st.text(max_size=12)
OBJECTS = st.dictionaries(NAMES, JSON, max_size=6)


@settings(max_examples=400)
@given(st.fixed_dictionaries({}, optional={"specattn": OBJECTS | JSON, "other": JSON}))
def test_options_are_taken_or_refused_in_words(config):
    try:
        options = SpecAttnOptions.from_additional(config)
    except OptionsError as error:
        assert len(str(error)) > 20
        return
    assert options.method in METHODS
    # What was taken means the same again.
    assert SpecAttnOptions.parse(options.model_dump(include=options.model_fields_set | {"method"})) == options


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(["specattn", "spec_attn"]) | st.text(max_size=12), JSON, max_size=4))
def test_a_request_is_exact_only_if_it_says_exact(given_arguments):
    class Parameters:
        extra_args = given_arguments

    if request.asks_for_exactness(Parameters):
        assert given_arguments["specattn"] == "exact" and request.problem(given_arguments) is None
    elif "specattn" in given_arguments:
        assert request.problem(given_arguments)


def test_what_a_client_sends_is_cheap_to_refuse_and_told_in_short():
    name, value = "sparse_atn" * 500_000, "x" * 5_000_000
    start = time.monotonic()
    assert request.problem({name: 1}) is None
    told = request.problem({"specattn": value})
    near = request.problem({"spec_attn" + name: 1})
    assert time.monotonic() - start < 5
    assert len(told) < 500 and len(near) < 500


MAP = json.loads(layer_map.shipped()["demo-sts"].read_text())


@settings(max_examples=200)
@given(data=st.data())
def test_a_map_with_something_else_in_it_is_taken_or_refused_in_words(data, tmp_path):
    changed = json.loads(json.dumps(MAP))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(list(changed)))
        if isinstance(changed[key], list) and changed[key] and data.draw(st.booleans()):
            changed[key][data.draw(st.integers(0, len(changed[key]) - 1))] = data.draw(JSON)
        else:
            changed[key] = data.draw(JSON)
    path = tmp_path / "map.json"
    path.write_text(json.dumps(changed))
    try:
        found = layer_map.read(path)
    except LayerMapError as error:
        assert str(path) in str(error)
        return
    assert len(found.layers) == found.target.num_hidden_layers
    assert all(0 <= source < found.draft.num_hidden_layers for source in found.sources)


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_map_are_refused(content):
    with pytest.raises(LayerMapError):
        layer_map.read(_file(content))


def _file(content: bytes):
    from pathlib import Path
    from tempfile import NamedTemporaryFile

    with NamedTemporaryFile(delete=False) as file:
        file.write(content)
    return Path(file.name)


def test_files_that_are_too_large_or_none_are_not_read(tmp_path):
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(2**34)  # takes no room on the disk
    with pytest.raises(LayerMapError, match="more than 8,388,608 bytes"):
        layer_map.read(large)
    with large.open("wb") as file:
        file.truncate(layer_map.LARGEST + 1)
    with pytest.raises(LayerMapError, match="more than 8,388,608 bytes"):
        layer_map.read(large)
    os.mkfifo(tmp_path / "pipe")  # whose reader would wait for ever
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing"):
        with pytest.raises(LayerMapError, match="cannot be read"):
            layer_map.read(path)
    nested = tmp_path / "nested.json"
    nested.write_text("[" * 200_000)
    with pytest.raises(LayerMapError, match="not valid"):
        layer_map.read(nested)


def test_a_whole_map_is_read():
    assert isinstance(layer_map.read(layer_map.shipped()["demo-sts"]), LayerMap)


def refused(text: str | bytes, tmp_path) -> str:
    path = tmp_path / "map.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LayerMapError) as found:
        layer_map.read(path)
    told = str(found.value)
    assert len(told) < 5000 and told.isprintable()
    return told


WHOLE = json.dumps(MAP)[:-1]


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (', "layers": [2, 2, 2, 2, 2, 2]}', "the key 'layers' is there twice"),
        (', "provenance": {"a": 1, "a": 2}}', "the key 'a' is there twice"),
        (', "provenance": NaN}', "NaN is no number"),
        (', "\\u001b[2J": 1}', "\\x1b[2J: Extra inputs"),
        (', "x": ' + "[" * 200_000, "nested too deep"),
        ("," + ",".join(f'"key{n}": 0' for n in range(100_000)) + "}", "and 99,990 other problems"),
        ("," + ",".join(f'"key{n}": 0' for n in [*range(400_000), 7]) + "}", "the key 'key7' is there twice"),
    ],
)
def test_maps_whose_meaning_is_open_or_whose_errors_are_many(end, told, tmp_path):
    assert told in refused(WHOLE + end, tmp_path)


@pytest.mark.parametrize("value", [True, "1", 1.0])
def test_a_layer_is_a_whole_number(value, tmp_path):
    changed = json.loads(json.dumps(MAP))
    changed["layers"][-1] = value
    assert "layers.5: Input should be a valid integer" in refused(json.dumps(changed), tmp_path)
    assert "calibrated: Input should be a valid boolean" in refused(json.dumps(MAP | {"calibrated": "off"}), tmp_path)


def test_files_that_never_end_or_have_no_name(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for name in (pipe, "/dev/zero", "a\0b", tmp_path):
        with pytest.raises(LayerMapError, match="cannot be read"):
            layer_map.read(Path(name))
    with pytest.raises(LayerMapError, match=r"cannot be read|not valid"):
        layer_map.read(Path("/proc/kmsg"))  # a regular file by its own account, which may have something to say


SECRET = "root:x:0:0"


@pytest.mark.parametrize(
    "content",
    [
        SECRET + " \\n",
        json.dumps(SECRET),
        json.dumps([SECRET]),
        json.dumps({"schema": SECRET, "method": SECRET, "layers": [SECRET], "target": SECRET}),
        json.dumps(MAP | {"method": SECRET, "provenance": SECRET, "draft": {**MAP["draft"], "weights": [SECRET]}}),
    ],
)
def test_an_error_shows_no_text_of_a_file(content, tmp_path):
    """The path may be a wrong one, and logs have more readers than files."""
    assert SECRET not in refused(content, tmp_path)


def test_only_json_files_are_maps(tmp_path):
    facts = LayerMap.model_validate(MAP)
    for name in ("/etc/passwd", str(tmp_path / "map.yaml"), "map", "", "../map.json/", "\x1b[2J" * 500):
        with pytest.raises(LayerMapError) as found:
            layer_map.resolve(name, facts.target, facts.draft)
        assert "shipped" in str(found.value) and len(str(found.value)) < 1000 and str(found.value).isprintable()


def test_no_request_names_a_file(monkeypatch):
    opened: list = []
    monkeypatch.setattr(data_file, "read", lambda path, largest: opened.append(path))
    of = {"layer_map": "/etc/passwd"}
    for value in (of, [of], "layer_map=/etc/passwd"):
        assert request.problem({"specattn": value}) is not None
    assert request.problem({"specattn.layer_map": "/etc/passwd"}) is not None
    assert not opened


def test_options_with_many_or_large_errors_are_told_in_short():
    for wrong in ({f"key{n}": 0 for n in range(100_000)}, {"ratio": "x" * 5_000_000}, {"dense_layers": [True]}):
        with pytest.raises(OptionsError) as found:
            SpecAttnOptions.parse({"method": "specattn"} | wrong)
        assert len(str(found.value)) < 20_000
    assert "true and false are no numbers" in str(found.value)


def test_numbers_of_thousands_of_digits_and_deep_nests_in_a_request():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, deep):
        assert "too large to show" in request.problem({"specattn": value})

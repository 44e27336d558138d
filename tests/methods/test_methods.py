"""Methods describe themselves: what is outside of their folder asks, and compares no names."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from specattn_vllm import methods
from specattn_vllm.methods.base import COMMON
from specattn_vllm.options import OptionsError, SpecAttnOptions

PACKAGE = Path(__file__).parents[2] / "specattn_vllm"
TOOLS = ("bench", "calibrate", "evaluation", "demo")
"""They name methods to run them, as users do."""


def conditions_on_names(path: Path) -> list[str]:
    """Comparisons with a method's name, as 'line: text'."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            words = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
            about = any(isinstance(leaf, ast.Attribute) and leaf.attr == "method" for leaf in ast.walk(node))
            if about and words & methods.METHODS.keys():
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_name_of_a_method_is_compared_with_outside_of_their_folder():
    files = [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in ("methods", *TOOLS)]
    assert len(files) > 50
    found = {str(p.relative_to(PACKAGE)): lines for p in files if (lines := conditions_on_names(p))}
    # Of a layer map's own field: 'sts' has heads.
    assert found.keys() <= {"layer_map.py"}, found


def test_the_test_above_finds_what_it_looks_for(tmp_path):
    (tmp_path / "a.py").write_text("if options.method in ('sketch', 'dense') or other == 'sts':\n    pass\n")
    assert conditions_on_names(tmp_path / "a.py") == ["1: options.method in ('sketch', 'dense')"]


@pytest.mark.parametrize("method", methods.METHODS.values(), ids=lambda method: method.name)
def test_what_a_method_says_of_itself(method):
    known = set(SpecAttnOptions.model_fields)
    assert COMMON | method.options | method.draft_options <= known
    assert method.lossless == ("lossless" in method.summary) == ("approximate" not in method.summary)
    if not isinstance(method.paper, str):
        assert set(method.paper) <= method.options, "a published setting of what means nothing"
    for path in (method.speculator, method.attach):
        if path is not None:
            module, name = path.rsplit(".", 1)
            assert f"{'class' if name[0].isupper() else 'def'} {name}(" in source_of(module)


def source_of(module: str) -> str:
    return (PACKAGE.parent / (module.replace(".", "/") + ".py")).read_text()


def test_a_name_is_given_once():
    again = dataclasses.replace(methods.METHODS["dense"], summary="another (lossless)")
    with pytest.raises(ValueError, match="there is a method 'dense' already"):
        methods.register(again)
    methods.register(methods.METHODS["dense"])


@pytest.fixture
def another(monkeypatch):
    """another(entry points): what other packages have."""
    before = dict(methods.METHODS)

    def put(*found):
        monkeypatch.setattr(methods, "entry_points", lambda group: found if group == "specattn_vllm.methods" else ())

    yield put
    methods.METHODS.clear()
    methods.METHODS.update(before)


def test_methods_of_other_packages_are_loaded_when_one_is_named(another):
    method = dataclasses.replace(methods.METHODS["sketch"], name="theirs")
    loads = []
    entry = SimpleNamespace(name="theirs", value="pkg:METHOD", load=lambda: loads.append(1) or method)
    another(entry)
    SpecAttnOptions(method="dense")
    assert not loads
    assert SpecAttnOptions(method="theirs").kind is method
    SpecAttnOptions(method="theirs")
    assert len(loads) == 1


def test_a_package_whose_method_cannot_be_loaded_is_named_and_keeps_no_other_from_being_found(another):
    def load():
        raise ImportError("no module named 'xyz'")

    method = dataclasses.replace(methods.METHODS["sketch"], name="others")
    wrong = SimpleNamespace(name="called", value="pkg:OTHER", load=lambda: method)
    broken = SimpleNamespace(name="theirs", value="pkg:METHOD", load=load)
    another(broken, wrong, SimpleNamespace(name="others", value="pkg:METHOD", load=lambda: method))
    assert SpecAttnOptions(method="others").kind is method
    with pytest.raises(OptionsError) as caught:
        SpecAttnOptions.parse({"method": "theirs"})
    told = str(caught.value)
    assert "no such method: choose from sketch, " in told
    assert "'theirs' of another package (pkg:METHOD) cannot be loaded: no module named 'xyz'" in told
    assert "the entry point is called 'called', and the method 'others'" in told


def test_a_method_of_another_package_has_a_preset_and_maps_as_ours_have(another):
    from specattn_vllm import layer_map

    paper = {"ratio": 0.3, "min_tokens": 5}
    method = dataclasses.replace(methods.METHODS["specattn"], name="theirs", paper=paper)
    another(SimpleNamespace(name="theirs", value="pkg:METHOD", load=lambda: method))
    for _ in range(2):
        options = SpecAttnOptions(method="theirs", preset="paper")
        assert (options.ratio, options.min_tokens) == (0.3, 5)
    with pytest.raises(layer_map.LayerMapError, match="cannot be read"):
        layer_map.resolve("no-such-map", None, None, method="theirs")
    another_one = dataclasses.replace(method, name="unpublished", paper="nobody published one")
    methods.register(another_one)
    with pytest.raises(OptionsError, match="has no such setting \\(nobody published one\\)"):
        SpecAttnOptions.parse({"method": "unpublished", "preset": "paper"})


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"method": "dense", "ratio": 0.5, "layer_map": "uniform"}, {"ratio", "layer_map"}),
        ({"method": "dense", "sparse_draft": True, "ratio": 0.5, "combine": "sum"}, {"combine"}),
        ({"method": "dense", "sparse_draft": True, "ratio": 0.5, "draft_ratio": 0.5, "min_tokens": 5}, {"ratio"}),
        ({"method": "sketch", "ratio": 0.5, "draft_ratio": 0.2, "induction": True}, {"induction"}),
        ({"method": "specattn", "ratio": 0.5, "sketch_bits": 4, "dilation": 2}, {"sketch_bits", "dilation"}),
        ({"method": "vegas", "ratio": 0.5, "dilation": 2, "induction": True, "sparse_draft": False},
         {"induction", "sparse_draft"}),
        ({"method": "streamingllm", "ratio": 0.5, "rule": "top_k", "dilation": 2}, {"rule", "dilation"}),
    ],
)  # fmt: skip
def test_options_of_other_methods_mean_nothing(options, idle):
    parsed = SpecAttnOptions(**options)
    given = frozenset(parsed.model_fields_set)
    assert parsed.kind.idle(given, drafts_sparsely=parsed.drafts_sparsely) == idle

"""Methods describe themselves: what is outside of their folder asks, and compares no names."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel

from specattn_vllm import methods
from specattn_vllm.methods.base import Method
from specattn_vllm.methods.budget import AuditedOptions, SketchedDraftOptions
from specattn_vllm.methods.by_draft import ByDraftOptions
from specattn_vllm.methods.self_draft import SelfDraftOptions
from specattn_vllm.options import OptionsError, SpecAttnOptions

PACKAGE = Path(__file__).parents[2] / "specattn_vllm"
TOOLS = ("bench", "calibrate", "evaluation", "demo")
"""They name methods to run them, as users do."""
CHOSEN = {"fixed_budget"}
"""What options say of their own values, whatever the method."""
BRANCHES = (ast.If, ast.IfExp, ast.While, ast.Assert)


def said() -> set[str]:
    """Names of the properties by which a method or its options answer with yes or no, or with one of a few words."""
    hints = {name: str(hint) for name, hint in Method.__annotations__.items()}
    properties = {
        name: value.fget.__annotations__["return"]
        for kind in (Method, *(cls for method in methods.METHODS.values() for cls in method.options.__mro__))
        for name, value in vars(kind).items()
        if isinstance(value, property) and kind.__module__.startswith("specattn_vllm.")
    }
    return {name for name, hint in (hints | properties).items() if hint in ("bool", "Reads")} - CHOSEN


def conditions(path: Path) -> list[str]:
    """Comparisons with a method's name, and conditions on what a method says of itself, as 'line: text'."""
    answers, found = said(), []
    for node in ast.walk(ast.parse(path.read_text())):
        asked = [node.test] if isinstance(node, BRANCHES) else []
        asked += node.ifs if isinstance(node, ast.comprehension) else []
        asked += [node] if isinstance(node, (ast.BoolOp, ast.Compare)) else []
        asked += [node] if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else []
        for test in asked:
            leaves = [*ast.walk(test)]
            # Results of evaluations tell what a method was, as data.
            attributes = {
                leaf.attr for leaf in leaves if isinstance(leaf, ast.Attribute) and ast.unparse(leaf.value) != "result"
            }
            words = {leaf.value for leaf in leaves if isinstance(leaf, ast.Constant)}
            named = isinstance(test, ast.Compare) and "method" in attributes and words & methods.METHODS.keys()
            if named or attributes & answers:
                found.append(f"{test.lineno}: {ast.unparse(test)}")
    return list(dict.fromkeys(found))


def test_nothing_outside_of_their_folder_depends_on_the_method():
    outside = [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in ("methods", *TOOLS)]
    files = [p for p in outside if p.name != "options.py"]
    assert len(files) > 50
    found = {str(p.relative_to(PACKAGE)): lines for p in files if (lines := conditions(p))}
    assert not found, found


def test_evaluations_ask_nothing_of_a_method_s_kind():
    """They name methods, and compare none."""
    found = {p.name: lines for p in (PACKAGE / "evaluation").rglob("*.py") if (lines := conditions(p))}
    assert not found, found


@pytest.mark.parametrize(
    ("line", "condition"),
    [
        ("if options.method in ('sketch', 'dense'):\n    pass", "options.method in ('sketch', 'dense')"),
        ("x = 1 if options.kind.per_head else 2", "options.kind.per_head"),
        ("x = [y for y in z if not y.lossless]", "not y.lossless"),
        ("x = self.kind.target_reads == 'everything'", "self.kind.target_reads == 'everything'"),
        ("x = options.needs_token_pages and y", "options.needs_token_pages and y"),
        ("other == 'sts'", None),
        ("resolve(name, per_head=options.needs_token_pages)", None),
        ("x = options.kind.crossover", None),
    ],
)
def test_the_tests_above_find_what_they_look_for(tmp_path, line, condition):
    (tmp_path / "a.py").write_text(line)
    assert conditions(tmp_path / "a.py") == ([] if condition is None else [f"1: {condition}"])


@pytest.mark.parametrize("method", methods.METHODS.values(), ids=lambda method: method.name)
def test_what_a_method_says_of_itself(method):
    options = SpecAttnOptions.parse({"method": method.name})
    assert type(options) is method.options
    assert isinstance(options, ByDraftOptions) == (method.target_reads == "draft's choice") == (method.plan is not None)
    # Each says who may draft, and one way of it.
    assert sum(isinstance(options, kind) for kind in (ByDraftOptions, SketchedDraftOptions, SelfDraftOptions)) == 1
    assert isinstance(options, AuditedOptions) == (not method.lossless) == ("verification" in options.sparse_readers)
    assert method.lossless == ("lossless" in method.summary) == ("approximate" not in method.summary)
    if not isinstance(method.paper, str):
        assert set(method.paper) <= method.options.model_fields.keys()
    for path in (options.speculator, method.attach, method.plan, method.check):
        if path is not None:
            module, name = path.rsplit(".", 1)
            assert f"{'class' if name[0].isupper() else 'def'} {name}(" in source_of(module)


def source_of(module: str) -> str:
    return (PACKAGE.parent / (module.replace(".", "/") + ".py")).read_text()


def test_a_name_is_given_once():
    again = dataclasses.replace(methods.METHODS["dense"], summary="another (lossless)")
    with pytest.raises(ValueError, match="a method named 'dense' already exists"):
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
    SpecAttnOptions.parse({"method": "dense"})
    assert not loads
    assert SpecAttnOptions.parse({"method": "theirs"}).kind is method
    SpecAttnOptions.parse({"method": "theirs"})
    assert len(loads) == 1


def test_a_package_whose_method_cannot_be_loaded_is_named_and_keeps_no_other_from_being_found(another):
    def load():
        raise ImportError("no module named 'xyz'")

    method = dataclasses.replace(methods.METHODS["sketch"], name="others")
    wrong = SimpleNamespace(name="called", value="pkg:OTHER", load=lambda: method)
    broken = SimpleNamespace(name="theirs", value="pkg:METHOD", load=load)
    another(broken, wrong, SimpleNamespace(name="others", value="pkg:METHOD", load=lambda: method))
    assert SpecAttnOptions.parse({"method": "others"}).kind is method
    with pytest.raises(OptionsError) as caught:
        SpecAttnOptions.parse({"method": "theirs"})
    told = str(caught.value)
    assert "no such method: choose from sketch, " in told
    assert "'theirs' of another package (pkg:METHOD) cannot be loaded: no module named 'xyz'" in told
    assert "the entry point is named 'called', but the method 'others'" in told


def test_a_method_of_another_package_has_a_preset_and_maps_as_ours_have(another):
    from specattn_vllm import layer_map

    paper = {"ratio": 0.3, "min_tokens": 5}
    method = dataclasses.replace(methods.METHODS["specattn"], name="theirs", paper=paper)
    another(SimpleNamespace(name="theirs", value="pkg:METHOD", load=lambda: method))
    for _ in range(2):
        options = SpecAttnOptions.parse({"method": "theirs", "preset": "paper"})
        assert (options.ratio, options.min_tokens) == (0.3, 5)
    with pytest.raises(layer_map.LayerMapError, match="is neither 'uniform', nor a shipped map"):
        layer_map.resolve("no-such-map", None, None, method="theirs")
    another_one = dataclasses.replace(method, name="unpublished", paper="nobody published one")
    methods.register(another_one)
    with pytest.raises(OptionsError, match="has no such setting \\(nobody published one\\)"):
        SpecAttnOptions.parse({"method": "unpublished", "preset": "paper"})


@pytest.mark.parametrize(
    ("options", "owners"),
    [
        ({"method": "dense", "layer_map": "uniform"}, "specattn, sts"),
        ({"method": "dense", "sparse_draft": True, "combine": "sum"}, "specattn, sts"),
        ({"method": "sketch", "dilation": 2}, "vegas"),
        ({"method": "specattn", "sketch_bits": 4}, "sketch, dense"),
        ({"method": "vegas", "sparse_draft": False}, "sketch, dense"),
        ({"method": "streamingllm", "rule": "top_k"}, "sketch, specattn, sts, vegas, dense"),
    ],
    ids=str,
)
def test_options_of_other_methods_are_refused(options, owners):
    key, value = list(options.items())[-1]
    with pytest.raises(OptionsError) as caught:
        SpecAttnOptions.parse(options)
    line = f"{key} = {value!r}: method {options['method']!r} has no such option. Remove it, or set method to one that"
    assert f"{line} has it: {owners}" in str(caught.value)


def test_a_method_may_have_options_that_no_other_has(another):
    class TheirOptions(methods.METHODS["dense"].options):
        colour: str = "red"

    method = dataclasses.replace(methods.METHODS["dense"], name="theirs", options=TheirOptions)
    another(SimpleNamespace(name="theirs", value="pkg:METHOD", load=lambda: method))
    assert SpecAttnOptions.parse({"method": "theirs"}).colour == "red"
    with pytest.raises(OptionsError, match="set method to one that has it: theirs"):
        SpecAttnOptions.parse({"method": "vegas", "colour": "blue"})


def test_options_that_are_no_options_are_refused(another):
    class Theirs(BaseModel):
        method: str

    method = dataclasses.replace(methods.METHODS["dense"], name="theirs", options=Theirs)
    another(SimpleNamespace(name="theirs", value="pkg:METHOD", load=lambda: method))
    with pytest.raises(OptionsError, match="'theirs': its options are a Theirs: make them a SpecAttnOptions"):
        SpecAttnOptions.parse({"method": "theirs"})

"""Who imports whom: no circles, production knows nothing of the tools, and what is plain data loads nothing."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

from specattn_vllm.methods import METHODS

ROOT = Path(__file__).parents[1]
FOLDERS = {"specattn_vllm": ROOT / "specattn_vllm", "specattn_vllm.kernels": ROOT / "kernels"}
TOOLS = ("bench", "calibrate", "evaluation", "demo", "cli", "completion", "info", "tools", "causes", "doctor")
REGISTRY = ("specattn_vllm.options", "specattn_vllm.methods")
"""Options look up the method that is named; methods bring options of their own."""


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if "overlay" not in parts:
                found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(name: str, path: Path, inside: bool = False) -> set[str]:
    """Absolute names of everything that a module imports as it loads, or for its annotations; `inside`: in its
    functions too, and of `from package import module` the module alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names, known = set(), modules().keys() if inside else set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if not inside and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*above, *([child.module] if child.module else [])])
                full = {f"{base}.{alias.name}" for alias in child.names}
                names.update(full & known if inside and full & known else {base, *full})
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    found = modules()
    assert len(found) > 150
    return {name: (imported(name, path) & found.keys()) - {name} for name, path in found.items()}


def test_there_are_no_circles(graph):
    has_none(graph)


def test_imports_inside_functions_make_no_circles_but_the_registry_s():
    found = modules()
    graph = {name: (imported(name, path, inside=True) & found.keys()) - {name} for name, path in found.items()}
    assert REGISTRY[1] in graph[REGISTRY[0]]
    graph[REGISTRY[0]].remove(REGISTRY[1])
    has_none(graph)


def has_none(graph: dict[str, set[str]]) -> None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_test_above_sees_circles():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_production_knows_nothing_of_the_tools(graph):
    def is_tool(name: str) -> bool:
        return name.split(".")[1:2] and name.split(".")[1] in TOOLS

    wrong = {(name, other) for name, others in graph.items() if not is_tool(name) for other in others if is_tool(other)}
    # The package's front door re-exports nothing, the plugin loads nothing of them.
    assert not wrong


def test_methods_are_data():
    """They are read by the command line, which has neither torch nor vLLM at hand."""
    for name, path in modules().items():
        if name.startswith("specattn_vllm.methods"):
            outside = {i.split(".")[0] for i in imported(name, path)} - {"__future__", "specattn_vllm"}
            assert outside <= {"collections", "dataclasses", "importlib", "pydantic", "typing"}, name


@pytest.mark.parametrize(("folder", "allowed"), [("selection", {"torch", "numpy"}), ("kernels", {"torch", "triton"})])
def test_the_core_knows_nothing_of_vllm(folder, allowed):
    found = {name: path for name, path in modules().items() if f"{name}.".startswith(f"specattn_vllm.{folder}.")}
    assert len(found) > 10 and f"specattn_vllm.{folder}" in found  # its __init__.py
    for name, path in found.items():
        outside = {i.split(".")[0] for i in imported(name, path, inside=True)} - sys.stdlib_module_names
        assert outside - {"specattn_vllm"} <= allowed, name


def conditions_on_methods(source: str, names: set[str], options: set[str]) -> list[str]:
    """Comparisons with a method or its name, tests of the class of its options, and tables by a method's name. What
    stands in a variable first is not seen."""

    def says(words: set[str], *parts: ast.AST) -> bool:
        return any(node.value in words for part in parts for node in ast.walk(part) if isinstance(node, ast.Constant))

    def is_method(part: ast.AST) -> bool:
        return bool(re.fullmatch(r".+\.method|(.+\.)?kind\.name|(.+\.)?options\.kind", ast.unparse(part)))

    def is_class(part: ast.AST) -> bool:
        return bool({*re.findall(r"\w+", ast.unparse(part))} & options)

    def is_one(node: ast.AST) -> bool:
        match node:
            case ast.Compare(left=left, comparators=others):
                parts = [left, *others]
                return says(names | options, *parts) or any(is_method(part) or is_class(part) for part in parts)
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
                return is_class(kinds)
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="method"))):
                return True  # such as startswith
            case ast.Call(func=ast.Attribute(attr="get"), args=[key, *_]) | ast.Subscript(slice=key):
                return is_method(key) and not ast.unparse(node).startswith("METHODS[")
            case ast.Match(subject=subject):
                return is_method(subject)
            case ast.MatchValue(value=value):
                return says(names, value)
            case ast.MatchClass(cls=kind):
                return is_class(kind)
        return False

    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if is_one(node)]


def test_only_methods_know_methods():
    """What differs between methods is asked of the method or of its options; docs/add-a-method.md relies on it."""
    sources = {name: path.read_text() for name, path in modules().items()}
    inside = {name: source for name, source in sources.items() if name.startswith("specattn_vllm.methods")}
    options = {
        node.name
        for source in inside.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }
    assert "SketchOptions" in options
    found = {
        name: conditions
        for name, source in sources.items()
        if name not in inside and (conditions := conditions_on_methods(source, {*METHODS}, options))
    }
    # The plugin is called as a method is.
    assert found.pop("specattn_vllm.info") == ["'specattn' not in allowed.split(',')"]
    assert found == {}


@pytest.mark.parametrize(
    "condition",
    [
        "a = options.method == x",
        "a = name in ('sts', y)",
        "a = isinstance(o, m.SketchOptions)",
        "a = type(o) is SketchOptions",
        "a = type(o).__name__ == 'SketchOptions'",
        "a = options.method.startswith(x)",
        "a = {**more}[options.method]",
        "a = TABLE.get(options.method, x)",
        "a = options.kind is x",
        "a = self.options.kind.name in x",
        "match a:\n    case 'vegas': pass",
        "match a:\n    case m.SketchOptions(): pass",
        "match options.method:\n    case x.Y: pass",
    ],
)
def test_the_test_above_sees_a_condition(condition):
    assert len(conditions_on_methods(condition, {"sts", "vegas"}, {"SketchOptions"})) == 1


def test_the_test_above_sees_nothing_else():
    source = "a = 'sts' + z\nb = METHODS[options.method].maps\nc = found.kind == 'counter'\nd = f(options.method)\n"
    assert conditions_on_methods(source, {"sts", "vegas"}, {"SketchOptions"}) == []

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
    found = {name: path for name, path in modules().items() if name.startswith(f"specattn_vllm.{folder}.")}
    assert len(found) > 10
    for name, path in found.items():
        outside = {i.split(".")[0] for i in imported(name, path, inside=True)} - sys.stdlib_module_names
        assert outside - {"specattn_vllm"} <= allowed, name


def conditions_on_methods(source: str, names: set[str], options: set[str]) -> list[str]:
    """Comparisons with a method or its name, and tests of the class of its options."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            words = {inner.value for part in parts for inner in ast.walk(part) if isinstance(inner, ast.Constant)}
            asks = any(isinstance(part, ast.Attribute) and part.attr == "method" for part in parts)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            words, asks = set(), bool({*re.findall(r"\w+", ast.unparse(node.args[1]))} & options)
        elif isinstance(node, ast.MatchValue):
            words, asks = {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)}, False
        else:
            continue
        if asks or words & names:
            found.append(ast.unparse(node))
    return found


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


def test_the_test_above_sees_conditions():
    source = "a = options.method == x\nb = name in ('sts', y)\nc = isinstance(o, m.SketchOptions)\nd = 'sts' + z\n"
    source += "match a:\n    case 'vegas': pass\n"
    assert len(conditions_on_methods(source, {"sts", "vegas"}, {"SketchOptions"})) == 4

"""How functions of vLLM's are replaced, and that each replacement has its reason and its end."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from specattn_vllm import compat
from specattn_vllm.compat.patching import MARK, patched


def patches() -> list[ast.FunctionDef]:
    """The functions of compat/ that replace something, or that `apply_all` calls."""
    files = Path(compat.__file__).parent.glob("*.py")
    functions = [
        node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    [apply_all] = (node for node in functions if node.name == "apply_all")
    called = {node.func.id for node in ast.walk(apply_all) if isinstance(node, ast.Call)}
    inside = {node.name for node in functions if "@patched(" in ast.unparse(node)}
    return [node for node in functions if node.name in called | inside]


@pytest.mark.parametrize("patch", patches(), ids=lambda node: node.name)
def test_each_patch_says_when_it_can_be_removed(patch):
    assert "Remove " in " ".join(ast.get_docstring(patch).split())


def test_functions_of_a_class_are_replaced_once_of_whatever_kind():
    class Theirs:
        def plain(self, x):
            return "plain", x

        @staticmethod
        def static(x):
            return "static", x

        @classmethod
        def of_class(cls, x):
            return cls.__name__, x

    for name in ("plain", "static", "of_class"):
        for _ in range(2):

            @patched(Theirs, name)
            def more(original, *arguments):
                return (*original(*arguments), "more")

    assert Theirs().plain(1) == ("plain", 1, "more")
    assert Theirs.static(2) == Theirs().static(2) == ("static", 2, "more")
    assert Theirs.of_class(3) == ("Theirs", 3, "more")
    assert getattr(Theirs.plain, MARK) and Theirs.plain.__wrapped__.__name__ == "plain"


def test_a_function_of_an_object_is_replaced_for_it_alone_each_time():
    class Theirs:
        def count(self):
            return 1

    one, other = Theirs(), Theirs()
    for _ in range(2):

        @patched(one, "count")
        def more(original):
            return original() + 1

    assert (one.count(), other.count()) == (3, 1)

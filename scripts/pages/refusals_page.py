"""Writes docs/refusals.md's lists from the code: every message with which a server is refused at its start.

python scripts/pages/refusals_page.py            # after a check was added or changed
python scripts/pages/refusals_page.py --check    # exit status 1 if the page is not what would be written
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there by itself under PYTHONSAFEPATH=1
import written_page

from specattn_vllm import options

PACKAGE = Path(__file__).parents[2] / "specattn_vllm"
FUNCTIONS = {
    "engine": ("_engine", "_connector"),
    "models": ("_models", "_windows", "_soft_cap"),
    "drafters": ("_speculation", "_positions"),
}
"""Section of the page -> functions of checks.py that yield the reasons of the one error."""
RAISED = {
    "backend": ("checks.py check",),
    "maps": ("layer_map.py with_dense local_heads read resolve", "speculation/maps.py model_facts resolve_layer_map"),
    "executors": (
        "executors/__init__.py resolve",
        "speculation/rounds.py __init__",
        "backend/impl.py __init__",
        "executors/xformers.py _as_sequence",
    ),
    "layers": (
        "compat/start.py get_attn_backend_cls",
        "compat/worker.py name_rows",
        "backend/target_choice.py target_layers",
        "speculation/wiring.py target_builder allocated refuse_if_too_large",
        "speculation/speculator.py set_attn",
        "speculation/self_speculator.py set_attn",
        "selection/pages.py page_strides",
    ),
}
"""Section -> files, with the functions that raise an error there."""


def text_of(node: ast.expr) -> str | None:
    """A string or f-string of the source, with <names> of what is filled in; None: it is neither."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else place(part) for part in node.values)
    return None


def place(part: ast.expr) -> str:
    """What stands for a value that is filled in."""
    value = part.value if isinstance(part, ast.FormattedValue) else part
    name = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else "..."
    if name.isupper():  # a constant of the options
        return str(getattr(options, name))
    return "..." if name == "..." else f"<{name.strip('_').replace('_', ' ')}>"


def yielded(tree: ast.AST, where: str) -> Iterator[str]:
    """What generators in a tree yield, in the order of the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Yield):
            if (found := node.value and text_of(node.value)) is None:
                raise ValueError(f"{where}, line {node.lineno}: a reason is no text that can be read here")
            yield found


def raised(tree: ast.AST) -> Iterator[str]:
    """The messages of the errors that are raised in a tree. One that is put together elsewhere is left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and (found := text_of(node.exc.args[0])):
            yield found


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def of_checks() -> dict[str, list[str]]:
    defined = functions_of(PACKAGE / "checks.py")
    found = {name: [*yielded(function, name)] for name, function in defined.items()}
    listed = [name for names in FUNCTIONS.values() for name in names]
    if missing := [name for name, told in found.items() if told and name not in listed]:
        raise ValueError(f"checks.py: {', '.join(missing)} yields reasons: add it to a section")
    return {section: [told for name in names for told in found[name]] for section, names in FUNCTIONS.items()}


def of_methods() -> list[str]:
    files = sorted((PACKAGE / "methods").glob("*.py"))
    return [told for path in files for told in yielded(ast.parse(path.read_text()), path.name)]


def of_raises(places: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for file, *names in map(str.split, places):
        defined = functions_of(PACKAGE / file)
        for name in names:
            told = [*raised(defined[name])]
            if not told:
                raise ValueError(f"{file}: {name} raises no error with a text: mend the list of this script")
            found += told
    return list(dict.fromkeys(found))


def sections() -> dict[str, str]:
    found = of_checks() | {"methods": of_methods()}
    found |= {section: of_raises(places) for section, places in RAISED.items()}
    return {section: "".join(f"- `{message}`\n" for message in told) for section, told in found.items()}


if __name__ == "__main__":
    sys.exit(written_page.main("refusals_page", __doc__.splitlines()[0], written_page.DOCS / "refusals.md", sections()))

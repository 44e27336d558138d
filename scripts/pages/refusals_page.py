"""Writes docs/refusals.md's lists from the start-up checks: every message with which a server is refused.

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

ROOT = Path(__file__).parents[2]
CHECKS, METHODS = ROOT / "specattn_vllm" / "checks.py", ROOT / "specattn_vllm" / "methods"
FUNCTIONS = {
    "engine": ("_engine",),
    "models": ("_models", "_windows", "_soft_cap"),
    "drafters": ("_speculation", "_positions"),
}
"""Section of the page -> functions of checks.py."""


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
    return "..." if name == "..." else f"<{name.replace('_', ' ')}>"


def messages(tree: ast.AST) -> Iterator[str]:
    """What generators in a tree yield, in the order of the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Yield) and node.value is not None and (found := text_of(node.value)):
            yield found


def of_functions(names: tuple[str, ...]) -> list[str]:
    defined = {node.name: node for node in ast.parse(CHECKS.read_text()).body if isinstance(node, ast.FunctionDef)}
    return [message for name in names for message in messages(defined[name])]


def of_methods() -> list[str]:
    return [message for path in sorted(METHODS.glob("*.py")) for message in messages(ast.parse(path.read_text()))]


def sections() -> dict[str, str]:
    found = {section: of_functions(names) for section, names in FUNCTIONS.items()} | {"methods": of_methods()}
    return {section: "".join(f"- `{message}`\n" for message in told) for section, told in found.items()}


if __name__ == "__main__":
    sys.exit(written_page.main("refusals_page", __doc__.splitlines()[0], written_page.DOCS / "refusals.md", sections()))

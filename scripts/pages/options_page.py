"""Writes the tables of docs/options.md from the models of the methods' options (`specattn_vllm/methods/`).

python scripts/pages/options_page.py            # after an option was added or changed
python scripts/pages/options_page.py --check    # exit status 1 if the page is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there by itself under PYTHONSAFEPATH=1
import written_page

from specattn_vllm.methods import DEFAULT, METHODS
from specattn_vllm.options import SpecAttnOptions

MORE = {
    "method": "[each of them](methods.md)",
    "crossover_tokens": "[small batches](tuning.md#small-batches)",
    "executor": "[which runs where](hardware.md#executors)",
    "layer_map": "[layer maps](layer-maps.md)",
    "preset": "[what it sets](methods.md#presets)",
    "audit_share": "[what it measures](metrics.md#audits)",
    "sparse_draft": "[drafting by a sketch](sketch.md#drafting-by-a-sketch)",
    "sketch_bits": "[what each costs](sketch.md#what-it-costs)",
    "epsilon": "[a guarantee](sketch.md#a-guarantee)",
    "dilation": "[self-speculation](methods.md#self-speculation)",
}
"""Where the documents say more of an option."""
WORDS = {"boolean": "true, false", "string": "text", "array": "a list of numbers"}
SIGNS = {"exclusiveMinimum": ">", "minimum": ">=", "maximum": "<=", "exclusiveMaximum": "<"}
MOST = 2**31 - 1
"""Bounds of a number that go without saying."""


def fields() -> dict[str, dict[str, dict[str, Any]]]:
    """Option -> method -> its JSON schema. `method` stands first, what all methods have by inheritance last."""
    shared = [key for key in SpecAttnOptions.model_fields if key != "method"]
    found: dict[str, dict[str, dict[str, Any]]] = {"method": {}}
    for name, method in METHODS.items():
        for key, field in method.options.model_json_schema()["properties"].items():
            found.setdefault(key, {})[name] = field
    return {key: found[key] for key in sorted(found, key=lambda key: key in shared)}


def as_text(value: Any) -> str:
    if value in (None, []):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else f"`{value}`" if isinstance(value, str) else str(value)


def defaults(key: str, by_method: dict[str, dict[str, Any]]) -> str:
    """'0.125', or '0.125 `sketch`, else 0.1': the most common one last."""
    if key == "method":
        return as_text(DEFAULT)
    told = {method: as_text(field["default"]) for method, field in by_method.items()}
    if len(told) == 2 and len(set(told.values())) == 2:
        return ", ".join(f"{default} `{method}`" for method, default in told.items())
    common = max(told.values(), key=list(told.values()).count)
    others = [f"{default} `{method}`" for method, default in told.items() if default != common]
    return ", ".join([*others, f"else {common}"]) if others else common


def methods_of(by_method: dict[str, dict[str, Any]]) -> str:
    if by_method.keys() == METHODS.keys():
        return "all"
    if len(missing := METHODS.keys() - by_method.keys()) == 1:
        return f"all but `{missing.pop()}`"
    return ", ".join(f"`{method}`" for method in by_method)


def allowed(key: str, field: dict[str, Any]) -> str:
    if key == "method":
        return ", ".join(f"`{name}`" for name in METHODS)
    kind = field["anyOf"][0] if "anyOf" in field else field  # the other is null
    if values := kind.get("enum", [kind["const"]] if "const" in kind else []):
        return ", ".join(map(as_text, values))
    if kind["type"] in WORDS:
        return WORDS[kind["type"]]
    bounds = [f"{sign} {kind[name]:g}" for name, sign in SIGNS.items() if kind.get(name, MOST) < MOST]
    return ", ".join(bounds)


def table(researchers: bool) -> str:
    rows = ["| key | methods | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    for key, by_method in fields().items():
        field = next(iter(by_method.values()))
        if (field.get("for") == "researchers") != researchers:
            continue
        meaning = " ".join(filter(None, (field["description"], f"More: {MORE[key]}." if key in MORE else "")))
        cells = (f"`{key}`", methods_of(by_method), defaults(key, by_method), allowed(key, field), meaning)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    tables = {"users": table(researchers=False), "researchers": table(researchers=True)}
    sys.exit(written_page.main("options_page", __doc__.splitlines()[0], written_page.DOCS / "options.md", tables))

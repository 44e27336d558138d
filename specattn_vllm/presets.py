"""Published settings of the methods, as options: what `preset` stands for.

Only what the papers state, or what third parties report of them (`Method.paper`); what they leave open keeps this
package's defaults (docs/options.md lists both).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specattn_vllm import methods

PRESETS = ("paper",)


def apply(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those of their preset filled in; what is given wins. Values of the wrong kind pass through, to be
    refused where all are.

    Raises ValueError for a method without a published setting.
    """
    preset, name = given.get("preset"), given.get("method", methods.DEFAULT)
    if preset not in PRESETS or not isinstance(name, str):
        return dict(given)
    try:
        method = methods.find(name)
    except ValueError:
        return dict(given)
    if isinstance(method.paper, str):
        published = [other.name for other in methods.METHODS.values() if not isinstance(other.paper, str)]
        raise ValueError(
            f"preset = {preset!r} sets how tokens are chosen, and method {name!r} has no such setting "
            f"({method.paper}): remove preset, or set method to one of {', '.join(published)}"
        )
    return {**method.paper, **given}

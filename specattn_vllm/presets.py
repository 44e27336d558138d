"""Published settings of the methods, as options: what `preset` stands for.

Only what the papers state, or what third parties report of them; what they leave open keeps this package's defaults
(docs/options.md lists both).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specattn_vllm.methods import METHODS

PRESETS = {
    "paper": {name: dict(method.paper) for name, method in METHODS.items() if not isinstance(method.paper, str)},
}
"""preset -> method -> options that it sets."""


def apply(given: Mapping[str, Any], default_method: str) -> dict[str, Any]:
    """Options with those of their preset filled in; what is given wins. Values of the wrong kind pass through, to be
    refused where all are.

    Raises ValueError for a method without a published setting.
    """
    preset, method = given.get("preset"), given.get("method", default_method)
    if not (isinstance(preset, str) and preset in PRESETS and isinstance(method, str)):
        return dict(given)
    if method not in METHODS:
        return dict(given)
    if isinstance(reason := METHODS[method].paper, str):
        raise ValueError(
            f"preset = {preset!r} sets how tokens are chosen, and method {method!r} has no such setting "
            f"({reason}): remove preset, or set method to one of {', '.join(PRESETS[preset])}"
        )
    return {**PRESETS[preset][method], **given}

"""Published settings of the methods, as options: what `preset` stands for.

Only what the papers state, or what third parties report of them; what they leave open keeps this package's defaults
(docs/options.md lists both).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        # Shah, arXiv 2510.27641: top-p of each draft step, united; the first two layers dense; no token always kept.
        "specattn": {
            "rule": "top_p",
            "top_p": 0.97,
            "combine": "union",
            "bonus_row": False,
            "induction": False,
            "dense_layers": (0, 1),
            "min_tokens": 0,
            "sink_tokens": 0,
            "recent_tokens": 0,
        },
        # Xu et al., arXiv 2605.15508: a fixed budget of tokens for each head, whatever the context.
        "sts": {
            "rule": "top_k",
            "ratio": 1.0,
            "min_tokens": 0,
            "max_tokens": 256,
            "sink_tokens": 0,
            "recent_tokens": 0,
            "bonus_row": False,
            "induction": False,
        },
        # Vegas, arXiv 2602.07223: 7% of the context and 256 tokens at least, one set for all heads of a layer; the
        # class's own default is 5%.
        "vegas": {
            "rule": "top_k",
            "ratio": 0.07,
            "min_tokens": 256,
            "sink_tokens": 0,
            "recent_tokens": 0,
            "dilation": 0,
        },
    },
}
UNPUBLISHED = {
    "dense": "it reads everything",
    "sketch": "it is this package's own",
    "streamingllm": "here it is a baseline of the same budget as 'vegas'",
}
"""Methods that no preset sets, and why."""
"""preset -> method -> options that it sets."""


def apply(given: Mapping[str, Any], default_method: str) -> dict[str, Any]:
    """Options with those of their preset filled in; what is given wins. Values of the wrong kind pass through, to be
    refused where all are.

    Raises ValueError for a method without a published setting.
    """
    preset, method = given.get("preset"), given.get("method", default_method)
    if not (isinstance(preset, str) and preset in PRESETS and isinstance(method, str)):
        return dict(given)
    if method in UNPUBLISHED:
        raise ValueError(
            f"preset = {preset!r} sets how tokens are chosen, and method {method!r} has no such setting "
            f"({UNPUBLISHED[method]}): remove preset, or set method to one of {', '.join(PRESETS[preset])}"
        )
    return {**PRESETS[preset].get(method, {}), **given}

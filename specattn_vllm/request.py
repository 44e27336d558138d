"""Options of a single request, in vLLM's own field for extra arguments.

    {"vllm_xargs": {"specattn": "exact"}}                       OpenAI API
    SamplingParams(extra_args={"specattn": "exact"})            offline

The verification of an exact request is dense. Other requests in the same batch may be sparse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specattn_vllm.misplaced import resembles, shown

KEY = "specattn"
EXACT = "exact"


def problem(extra_args: Mapping[str, Any] | None) -> str | None:
    """The error in our part of a request's extra arguments; None if there is none."""
    if not extra_args:
        return None
    if KEY not in extra_args:
        # A misspelt name must not turn an exact request into an approximate one.
        near = next((name for name in extra_args if resembles(name, KEY)), None)
        if near is None:
            return None
        return (
            f"{shown(near)} in the request's extra arguments is not a name that anything reads: for exact verification "
            f"give {{'{KEY}': '{EXACT}'}}; leave it out to use the server's setting"
        )
    if extra_args[KEY] == EXACT:
        return None
    return (
        f"{KEY} = {shown(extra_args[KEY])} in the request's extra arguments: the only value is '{EXACT}' (verification "
        "reads all of the context); leave it out to use the server's setting"
    )


def asks_for_exactness(params: Any) -> bool:
    """Whether a request's sampling parameters (None for pooling) ask for exact verification."""
    return bool(getattr(params, "extra_args", None)) and params.extra_args.get(KEY) == EXACT

"""What one request may ask for, in vLLM's own field for extra arguments.

    {"vllm_xargs": {"specattn": "exact"}}                       OpenAI API
    SamplingParams(extra_args={"specattn": "exact"})            offline

An exact request is verified against all of its context, beside others in the same batch that are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specattn_vllm.misplaced import resembles

KEY = "specattn"
EXACT = "exact"


def problem(extra_args: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a request's extra arguments, as far as they are ours; None if nothing is."""
    if not extra_args:
        return None
    if KEY not in extra_args:
        # Whoever asks for an exact answer must not get an approximate one for a slip in the name.
        near = next((name for name in extra_args if resembles(name, KEY)), None)
        if near is None:
            return None
        return (
            f"{near!r} in the request's extra arguments is not a name that anything reads: for exact verification give "
            f"{{'{KEY}': '{EXACT}'}}; leave it out for what the server was started with"
        )
    if extra_args[KEY] == EXACT:
        return None
    return (
        f"{KEY} = {extra_args[KEY]!r} in the request's extra arguments: the only value is '{EXACT}' (verification "
        "reads all of the context); leave it out for what the server was started with"
    )


def asks_for_exactness(params: Any) -> bool:
    """Whether a request's sampling parameters (None for pooling) ask for exact verification."""
    return bool(getattr(params, "extra_args", None)) and params.extra_args.get(KEY) == EXACT

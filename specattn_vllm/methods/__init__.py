"""The methods, by name: one file each, and its line here. `base.py` says what a method is; options that several share
are in `budget.py` and `by_draft.py`.

Other packages add theirs by an entry point of the group `specattn_vllm.methods`, by the method's name, which leads to a
`Method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from specattn_vllm.methods import dense, sketch, specattn, streamingllm, sts, vegas
from specattn_vllm.methods.base import Method

METHODS: dict[str, Method] = {}
DEFAULT = "sketch"
GROUP = "specattn_vllm.methods"


def register(method: Method) -> None:
    """Make a method one that `--additional-config` may name; of a name that is taken, ValueError."""
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"there is a method {method.name!r} already: give another name")


for _module in (sketch, specattn, sts, vegas, streamingllm, dense):
    register(_module.METHOD)


def load_others() -> list[str]:
    """Register the methods of other packages, and return what could not be loaded, in words. Not done before a name is
    unknown: they may import all of this package, torch and vLLM."""
    failed = []
    for entry in entry_points(group=GROUP):
        if entry.name in METHODS:
            continue
        try:
            method = entry.load()
            if method.name != entry.name:
                raise ValueError(f"the entry point is called {entry.name!r}, and the method {method.name!r}")
            register(method)
        except Exception as error:
            failed.append(f"{entry.name!r} of another package ({entry.value}) cannot be loaded: {error}")
    return failed


def find(name: Any) -> Method:
    """The method of a name; ValueError where there is none, and for what is no name."""
    failed = [] if name in [*METHODS] else load_others()
    if name not in [*METHODS]:
        told = f"method = {name!r}: there is no such method: choose from {', '.join(METHODS)}"
        raise ValueError("; ".join([told, *failed]))
    return METHODS[name]


def published(method: Method) -> Mapping[str, Any]:
    """The published setting of a method, as options: only what the paper states, or what third parties report of it;
    what it leaves open keeps the defaults. ValueError where there is none."""
    if isinstance(method.paper, str):
        others = [other.name for other in METHODS.values() if not isinstance(other.paper, str)]
        raise ValueError(
            f"preset = 'paper' sets how tokens are chosen, and method {method.name!r} has no such setting "
            f"({method.paper}): remove preset, or set method to one of {', '.join(others)}"
        )
    return method.paper

"""The registry of methods. Each method has one file in this folder and is listed once in this module. `base.py` says
what a method is. Options that several methods share are in `budget.py`, `by_draft.py` and `self_draft.py`.

Another package adds a method through an entry point of the group `specattn_vllm.methods`. The entry point has the
method's name and leads to a `Method`.
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
    """Add a method, so that `--additional-config` may name it. Raises ValueError if its name is taken."""
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"a method named {method.name!r} already exists: choose another name")


for _module in (sketch, specattn, sts, vegas, streamingllm, dense):
    register(_module.METHOD)


def load_others() -> list[str]:
    """Register the methods of other packages. Returns one sentence for each that could not be loaded. `find` calls this
    only for an unknown name, because these packages may import all of this package, torch and vLLM."""
    failed = []
    for entry in entry_points(group=GROUP):
        if entry.name in METHODS:
            continue
        try:
            method = entry.load()
            if method.name != entry.name:
                raise ValueError(f"the entry point is named {entry.name!r}, but the method {method.name!r}")
            register(method)
        except Exception as error:
            failed.append(f"{entry.name!r} of another package ({entry.value}) cannot be loaded: {error}")
    return failed


def find(name: Any) -> Method:
    """The method with this name. Raises ValueError if there is none, or if `name` is not a string."""
    failed = [] if name in [*METHODS] else load_others()
    if name not in [*METHODS]:
        told = f"method = {name!r}: there is no such method: choose from {', '.join(METHODS)}"
        raise ValueError("; ".join([told, *failed]))
    return METHODS[name]


def published(method: Method) -> Mapping[str, Any]:
    """The published setting of a method, as options. It holds only what the paper states, or what third parties report
    about it; all other options keep their defaults. Raises ValueError if the method has no published setting."""
    if isinstance(method.paper, str):
        others = [other.name for other in METHODS.values() if not isinstance(other.paper, str)]
        raise ValueError(
            f"preset = 'paper' sets how tokens are chosen, and method {method.name!r} has no such setting "
            f"({method.paper}): remove preset, or set method to one of {', '.join(others)}"
        )
    return method.paper

"""The methods, by name: one file each, and its line here. `base.py` says what a method is."""

from __future__ import annotations

from specattn_vllm.methods import dense, sketch, specattn, streamingllm, sts, vegas
from specattn_vllm.methods.base import Method

METHODS: dict[str, Method] = {}
DEFAULT = "sketch"


def register(method: Method) -> None:
    """Make a method one that `--additional-config` may name; of a name that is taken, ValueError."""
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"there is a method {method.name!r} already: give another name")


for module in (sketch, specattn, sts, vegas, streamingllm, dense):
    register(module.METHOD)

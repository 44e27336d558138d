"""The methods, by name: one file each, and its line here. `base.py` says what a method is.

Other packages add theirs by an entry point of the group `specattn_vllm.methods`, by the method's name, which leads to a
`Method`.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from specattn_vllm.methods import dense, sketch, specattn, streamingllm, sts, vegas
from specattn_vllm.methods.base import Method

METHODS: dict[str, Method] = {}
DEFAULT = "sketch"
GROUP = "specattn_vllm.methods"


def register(method: Method) -> None:
    """Make a method one that `--additional-config` may name; of a name that is taken, ValueError."""
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"there is a method {method.name!r} already: give another name")


for module in (sketch, specattn, sts, vegas, streamingllm, dense):
    register(module.METHOD)

def load_others() -> None:
    """Register the methods of other packages. Not done before a name is unknown: they may import all of this package,
    torch and vLLM."""
    for entry in entry_points(group=GROUP):
        if entry.name not in METHODS:
            try:
                register(entry.load())
            except Exception as error:
                raise RuntimeError(
                    f"the method {entry.name!r} of another package ({entry.value}) cannot be loaded: {error}. Mend or "
                    "uninstall that package"
                ) from error

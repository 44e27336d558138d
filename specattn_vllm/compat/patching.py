"""How a function of vLLM's, or of Triton's, is replaced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

MARK = "_specattn_patched"


def patched(owner: Any, name: str) -> Callable[[Callable], None]:
    """Decorator: replaces `owner.name` by the decorated function, which gets the original before the arguments. A
    function of a class or a module is replaced once, the second time has no effect. One of an object is replaced each
    time."""
    static = inspect.getattr_static(owner, name)
    original = static.__func__ if isinstance(static, classmethod) else getattr(owner, name)

    def put(replacement: Callable) -> None:
        if isinstance(owner, (type, ModuleType)) and hasattr(original, MARK):
            return

        @functools.wraps(original, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        setattr(call, MARK, True)
        setattr(owner, name, type(static)(call) if isinstance(static, (classmethod, staticmethod)) else call)

    return put

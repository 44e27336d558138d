"""A gap in Triton 3.9's interpreter that vLLM's kernels fall into."""

from __future__ import annotations

_MARK = "_specattn_mended"


def accept_integer_masks() -> None:
    """Let loads and stores take boolean masks that arrive as integers.

    Combining a scalar condition with a block of conditions leaves NumPy integers behind, which a compiled kernel never
    sees and the interpreter refuses: "mask has unsupported dtype". It stops a server at its first request with
    structured output. Goes when Triton's interpreter casts masks itself.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    if getattr(InterpreterBuilder, _MARK, False):
        return
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def as_bool(mask):
        if mask.data.dtype != np.bool_:
            # The value of a one-bit integer is its lowest bit, whatever the width it was computed in.
            mask.data = (mask.data & 1).astype(np.bool_)
        return mask

    def create_masked_load(self, ptrs, mask, *rest):
        return load(self, ptrs, as_bool(mask), *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        return store(self, ptrs, value, as_bool(mask), *rest)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store
    setattr(InterpreterBuilder, _MARK, True)

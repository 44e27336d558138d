"""Gaps in Triton 3.9's interpreter that vLLM's kernels fall into, and what makes it slower than it has to be."""

from __future__ import annotations

import dataclasses
import inspect

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


def compute_log1p() -> None:
    """Let kernels take the logarithm of 1 + x from the device's library, which has no code for the interpreter: its
    functions give None there. vLLM's rejection sampling does so for drafts that were drawn from a draft model's
    distribution. Goes when Triton's interpreter runs that library's functions.
    """
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    if getattr(libdevice, _MARK, False):
        return

    def log1p(x):
        with np.errstate(divide="ignore", invalid="ignore"):  # as on a GPU: what comes of -1 and less is left out later
            return tl.core.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype.scalar), x.type)

    libdevice.log1p = log1p
    setattr(libdevice, _MARK, True)


def leave_out_needless_work() -> None:
    """Let the interpreter run kernels in about half of the time, with the same results.

    Two things cost it as much as the kernels' own arithmetic. It lists all members of `triton.language` at each launch
    and at each call of a device function, to find the few dozen that it replaces: their names are looked up once here.
    And it computes each sum, difference and product of integers a second time in 64 bits, to find an overflow, and then
    throws the finding away, because it reports one in debug mode only. Goes when Triton's interpreter does neither.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, _MARK, False):
        return
    # While no kernel runs, so before any member is replaced.
    packages = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    names = {package: [n for n, m in inspect.getmembers(package) if tl.core.is_builtin(m)] for package in packages}

    def patch_builtin(package, builder, scope):
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # not replaced already, by the kernel that calls this function
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    setattr(interpreter, _MARK, True)

"""Corrections of Triton 3.9's interpreter: errors in vLLM's kernels, and unnecessary work that makes it slow."""

from __future__ import annotations

import dataclasses
import inspect

from specattn_vllm.compat.patching import MARK, patched


def accept_integer_masks() -> None:
    """Let loads and stores accept boolean masks that are stored as integers.

    Combining a scalar condition with a block of conditions gives NumPy integers. A compiled kernel never sees these,
    but the interpreter refuses them: "mask has unsupported dtype". This stops a server at its first request with
    structured output. Remove when Triton's interpreter casts masks itself.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    def as_bool(mask):
        if mask.data.dtype != np.bool_:
            # The value of a one-bit integer is its lowest bit, in whatever width it was computed.
            mask.data = (mask.data & 1).astype(np.bool_)
        return mask

    @patched(InterpreterBuilder, "create_masked_load")
    def create_masked_load(load, self, ptrs, mask, *rest):
        return load(self, ptrs, as_bool(mask), *rest)

    @patched(InterpreterBuilder, "create_masked_store")
    def create_masked_store(store, self, ptrs, value, mask, *rest):
        return store(self, ptrs, value, as_bool(mask), *rest)


def argmax_of_nan() -> None:
    """Let argmax and argmin of nothing but NaN be 0. A compiled kernel gives some index there, but the interpreter
    raises "All-NaN slice encountered", so that one request whose logits are NaN would stop the server. Remove when
    Triton's interpreter gives an index.
    """
    import numpy as np
    from triton.runtime.interpreter import ReduceOps

    @patched(ReduceOps, "min_max")
    def min_max(original, self, input, val_reduce_op, idx_reduce_op=None):
        def index(data, axis, keepdims):
            data = np.where(np.isnan(data).all(axis=axis, keepdims=True), 0, data)
            return idx_reduce_op(data, axis=axis, keepdims=keepdims)

        return original(self, input, val_reduce_op, index if idx_reduce_op else None)


def compute_libdevice() -> None:
    """Implement log1p and isnan of the device library (`libdevice`) for the interpreter, where its functions return
    None. vLLM's rejection sampling uses the first for drafts that were sampled from a draft model's distribution, and
    its count of NaN in logits (VLLM_COMPUTE_NANS_IN_LOGITS) the second. Remove when Triton's interpreter runs that
    library's functions.
    """
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    @patched(libdevice, "log1p")
    def log1p(original, x):
        with np.errstate(divide="ignore", invalid="ignore"):  # as on a GPU; results for x <= -1 are not used
            return tl.core.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype.scalar), x.type)

    @patched(libdevice, "isnan")
    def isnan(original, x):
        return x != x


def leave_out_needless_work() -> None:
    """Let the interpreter run kernels in about a third of the time, with the same results.

    The interpreter spends more time on the following than on the kernels' own arithmetic:

    - At each launch and each call of a device function, it lists all members of `triton.language` to replace a few
      dozen of them. Here the replacements are made once, and installed once for a launch and all functions it calls.
    - It computes each sum, difference and product of integers a second time in 64 bits to detect overflow, and then
      discards the result, because it reports overflow in debug mode only.
    - It rebuilds the table of NumPy's types for each lookup.
    - It wraps the shape of each value again, number by number.

    Remove when Triton's interpreter does none of these.
    """
    from triton.runtime import interpreter

    if getattr(interpreter, MARK, False):
        return
    _replace_members_once(interpreter)
    _look_types_up(interpreter)
    _share_shapes()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    setattr(interpreter, MARK, True)


def _replace_members_once(interpreter) -> None:
    import triton.language as tl

    def interpreted(member):
        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **kwargs)

        return call

    # Collected while no kernel runs, so before any member is replaced.
    packages = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    members = [(p, name, m) for p in packages for name, m in inspect.getmembers(p) if tl.core.is_builtin(m)]
    replacements = [(package, name, interpreted(member)) for package, name, member in members]
    running = []

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            running.clear()

    def patch_lang(fn):
        if running:  # a device function: the kernel that calls it has already replaced all members
            return interpreter._LangPatchScope()
        running.append(fn)
        scope = Scope()
        for package, name, replacement in replacements:
            scope.set_attr(package, name, replacement)
        interpreter._patch_lang_tensor(tl.tensor, scope)
        # Kernels use `tl`, Triton's own device functions use `tl.core`.
        interpreter._patch_lang_core(tl, scope)
        interpreter._patch_lang_core(tl.core, scope)
        return scope

    interpreter._patch_lang = patch_lang


def _look_types_up(interpreter) -> None:
    import triton.language as tl

    find, known = interpreter._get_np_dtype, {}

    def get_np_dtype(type):
        scalar = type.element_ty if isinstance(type, tl.block_type) else type
        if isinstance(scalar, tl.pointer_type):
            return find(scalar)
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = get_np_dtype


def _share_shapes() -> None:
    import triton.language as tl

    make, known = tl.tensor.__init__, {}

    def init(self, handle, type) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in known:
            make(self, handle, type)
            known[shape] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[shape]

    tl.tensor.__init__ = init

"""Helpers for the argument checks in `contracts.py` of each subfolder.

There, each operation has one check with its name. The Triton launcher and the PyTorch reference both call it, so both
refuse the same arguments with the same message. A wrong shape in a kernel would read or write other memory. No check
reads the *contents* of a tensor, because on a GPU that would wait for the device. All errors are ``ValueError("<name>:
got ..., wanted ...")``.
"""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (64, 128)  # the Triton kernels are tuned and tested for these; the references accept any size


def expect(ok: bool, name: str, got: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got}, wanted {wanted}")


def tensor(name: str, value, shape: tuple, dtypes, device=None) -> None:
    """Check one tensor. ``None`` in ``shape`` means any size. The last dimension must be contiguous, because kernels
    add plain offsets along it. ``dtypes``: one dtype or a tuple of them."""
    expect(isinstance(value, torch.Tensor), name, type(value).__name__, "a tensor")
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    expect(value.dtype in dtypes, name, value.dtype, " or ".join(map(str, dtypes)))
    fits = value.dim() == len(shape) and all(w is None or w == s for s, w in zip(value.shape, shape, strict=True))
    expect(fits, name, f"shape {tuple(value.shape)}", "shape " + str(tuple("any" if s is None else s for s in shape)))
    expect(value.shape[-1] <= 1 or value.stride(-1) == 1, name, f"strides {value.stride()}", "last stride 1")
    expect(device is None or value.device == device, name, f"device {value.device}", str(device))


def group_size(query_heads: int, heads: int, name: str) -> int:
    expect(heads > 0 and query_heads % heads == 0, name, f"{heads} heads for {query_heads} query heads", "a divisor")
    return query_heads // heads


def head_size(size: int) -> None:
    expect(size in HEAD_SIZES, "query", f"head size {size}", f"one of {HEAD_SIZES} (Triton kernels)")

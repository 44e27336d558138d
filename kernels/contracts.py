"""What argument checks (`contracts.py` of each room) are made of, for Triton launchers and PyTorch references alike.

Every operation has one function of its name there, so that both versions refuse the same arguments with the same words:
a wrong shape that reaches a kernel reads or writes someone else's memory. Nothing here looks at the *contents* of a
tensor, which on a GPU would wait for the device. All errors are ``ValueError("<name>: got ..., wanted ...")``.
"""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (64, 128)  # what the Triton kernels are tuned and tested for; the references take any


def expect(ok: bool, name: str, got: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got}, wanted {wanted}")


def tensor(name: str, value, shape: tuple, dtypes, device=None) -> None:
    """Check one tensor. ``None`` in ``shape`` is any size; the last dim has to be contiguous (kernels add plain
    offsets along it); ``dtypes`` is one dtype or a tuple of them."""
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

"""Contracts: what the arguments of an operation must be. ``contracts.py`` of each folder has one for each operation.

A contract is a table of tensors, and a function with the conditions that a table cannot express. Kernel and reference
are decorated with it, so both refuse the same arguments with the same message. A wrong shape in a kernel would read or
write other memory. No check reads the *contents* of a tensor, because on a GPU that would wait for the device. All
errors are ``ValueError("<name>: got ..., wanted ...")``.

A line of a table has names, sizes, a dtype (see ``DTYPES``) and a meaning:

    query, out  [T, Hq, D]     floats
    key, out    [any, D]       query              the dtype of another argument
    kv_cache    [any, 2 * D]   query_or_fp8       or that of an 8-bit cache
    lse         [R, C * Hq]    float32 or None    a size may be computed from those above
    lens        [>= R]         int32              R or more
    scale       float                             lines without sizes are not checked, nor lines that begin with a space

A name in the sizes is the same number in all lines. All tensors are on one device. The last dimension is contiguous,
because kernels add plain offsets along it; other strides are arbitrary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import wraps
from types import CodeType
from typing import Any

import torch

FP8 = torch.float8_e4m3fn
"""Elements of an 8-bit cache. A kernel turns them into the dtype of the query, which has all their values."""
HEAD_SIZES = (64, 96, 128, 192, 256)  # the kernels are tested for these, and tuned for 64 and 128; references take any
DTYPES = {
    "floats": (torch.float32, torch.float16, torch.bfloat16),
    "integers": (torch.int32, torch.int64),
    "scores": (torch.float32, torch.bfloat16),
} | {
    name: (getattr(torch, name),) for name in ["float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"]
}
LINE = re.compile(r"(\w+(?:, \w+)*) +\[([^]]+)\] +(\w+)( or None)?")


def expect(ok: bool, name: str, got: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got}, wanted {wanted}")


def group_size(query_heads: int, heads: int, name: str) -> int:
    expect(heads > 0 and query_heads % heads == 0, name, f"{heads} heads for {query_heads} query heads", "a divisor")
    return query_heads // heads


def head_size(size: int) -> None:
    expect(size in HEAD_SIZES, "query", f"head size {size}", f"one of {HEAD_SIZES} (Triton kernels)")


def _size(text: str) -> tuple[str, CodeType | None, bool]:
    """A size of a table: name or expression, code of an expression, and whether more will do."""
    name = text.removeprefix(">= ")
    return name, None if name.isidentifier() else compile(name, name, "eval"), name != text


def _value(code: CodeType, sizes: dict[str, int]) -> int | None:
    try:
        return eval(code, {}, sizes)
    except NameError:  # the size of an argument that is None
        return None


def _told(size: str, code: CodeType | None, least: bool, sizes: dict[str, int]) -> int | str:
    wanted = sizes.get(size, "any") if code is None else _value(code, sizes)
    return f"{wanted} or more" if least else "any" if wanted is None else wanted


class Table:
    def __init__(self, text: str, views: tuple[str, ...] = ()) -> None:
        """views: tensors that may be views of the host's memory, whose device index has no meaning."""
        self.views = views
        lines = filter(None, map(LINE.match, inspect.cleandoc(text).splitlines()))
        self.tensors = [
            (name, [_size(size) for size in line[2].split(", ")], DTYPES.get(line[3], line[3]), line[4] is not None)
            for line in lines
            for name in line[1].split(", ")
        ]

    def check(self, given: Mapping[str, Any], device: torch.device | None = None, **sizes: int) -> None:
        """device: of all tensors; None: that of the first one. sizes: those that are known already. Some operations run
        between steps with a dozen small tensors, where the host's time counts, so messages are made only if needed."""
        for name, dims, dtypes, optional in self.tensors:
            value = given[name]
            if value is None and optional:
                continue
            if not isinstance(value, torch.Tensor):
                expect(False, name, type(value).__name__, "a tensor")
            if isinstance(dtypes, str):
                other = dtypes.removesuffix("_or_fp8")
                dtypes = (given[other].dtype, FP8) if other != dtypes else (given[other].dtype,)
            if value.dtype not in dtypes:
                expect(False, name, value.dtype, " or ".join(map(str, dtypes)))
            shape, new = value.shape, []
            fits = len(shape) == len(dims)
            for (size, code, least), found in zip(dims, shape, strict=False):
                wanted = sizes.get(size) if code is None else _value(code, sizes)
                if wanted is None:
                    if size != "any":
                        sizes[size] = found
                        new.append(size)
                elif found != wanted and not (least and found > wanted):
                    fits = False
            if not fits:
                known = {size: number for size, number in sizes.items() if size not in new}
                told = [_told(size, code, least, known) for size, code, least in dims]
                expect(False, name, f"shape {tuple(shape)}", f"shape {tuple(told)}")
            if shape[-1] > 1 and value.stride(-1) != 1:
                expect(False, name, f"strides {value.stride()}", "last stride 1")
            device = device or value.device
            if value.device != device and (name not in self.views or value.device.type != device.type):
                expect(False, name, f"device {value.device}", str(device))


class Contract:
    """A table, and a function with further conditions, which takes the arguments that it names."""

    def __init__(self, text: str, conditions: Callable[..., None] | None = None) -> None:
        self.table, self.conditions = Table(text), conditions
        self.names = tuple(inspect.signature(conditions).parameters) if conditions else ()

    def __call__(self, *arguments: Any, **named: Any) -> None:
        """Check the arguments of an operation. Those without a name are in the order of the conditions' parameters."""
        given = dict(zip(self.names, arguments, strict=False)) | named
        self.table.check(given)
        if self.conditions is not None:
            self.conditions(*[given[name] for name in self.names])


def contract(text: str) -> Callable[[Callable[..., None]], Contract]:
    """Decorates the conditions."""
    return lambda conditions: Contract(text, conditions)


def checked(check: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates an operation, whose arguments a contract checks in every call."""

    def made(operation: Callable[..., None]) -> Callable[..., None]:
        defaults = {name: parameter.default for name, parameter in inspect.signature(operation).parameters.items()}

        @wraps(operation)
        def run(*arguments: Any, **named: Any) -> None:
            check(**{**defaults, **dict(zip(defaults, arguments, strict=False)), **named})
            operation(*arguments, **named)

        return run

    return made

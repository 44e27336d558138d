"""Devices, tolerances, and builders of poisoned inputs for the kernel tests.

The same test bodies run twice: in Triton's interpreter where there is no GPU, and compiled on CUDA where there is one
(marked ``gpu``). Whatever a kernel must not read is NaN or an index far out of range.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Following one of these faults or reads NaN; both kinds turn up in a block table that is not cleared between requests.
STALE_BLOCKS = (2_000_000_000, -7)
OFFSET = 48  # elements before the cache in its storage

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


@dataclass
class Paged:
    """A paged cache and what it holds: ``keys[r]``, ``values[r]`` are [H, seq_len, D]."""

    kv_cache: torch.Tensor  # [B, H, N, 2D], any layout
    kv_pages: torch.Tensor  # [B * N * H, 2D], the same storage
    page_strides: tuple[int, int, int]
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def _paged(lens, heads, size, block_size, layout, device, dtype, seed=0, extra_blocks=2, in_order=False):
    gen = torch.Generator().manual_seed(seed)
    used = [-(-n // block_size) for n in lens]
    blocks = sum(used) + 3  # some blocks belong to nobody
    width = max(used) + extra_blocks
    shape = (blocks, block_size, heads, 2 * size) if layout == "LBNHC" else (blocks, heads, block_size, 2 * size)
    numel = blocks * block_size * heads * 2 * size
    storage = torch.full((OFFSET + numel,), torch.nan, dtype=dtype)
    ids = torch.arange(blocks) if in_order else torch.randperm(blocks, generator=gen)
    table = torch.tensor(STALE_BLOCKS, dtype=torch.int32).repeat(len(lens), width)[:, :width].contiguous()
    flat = storage[OFFSET:].view(shape)
    logical = flat.transpose(1, 2) if layout == "LBNHC" else flat
    keys, values, first = [], [], 0
    for r, n in enumerate(lens):
        mine = ids[first : first + used[r]]
        first += used[r]
        table[r, : used[r]] = mine.int()
        content = torch.randn(heads, n, 2 * size, generator=gen).to(dtype)
        for i, block in enumerate(mine.tolist()):
            part = content[:, i * block_size : (i + 1) * block_size]
            logical[block, :, : part.shape[1]] = part
        keys.append(content[..., :size].to(device))
        values.append(content[..., size:].to(device))
    storage = storage.to(device)
    flat = storage[OFFSET:].view(shape)
    strides = (block_size * heads, 1, heads) if layout == "LBNHC" else (heads * block_size, block_size, 1)
    return Paged(
        flat.transpose(1, 2) if layout == "LBNHC" else flat,
        flat.view(-1, 2 * size),
        strides,
        table.to(device),
        torch.tensor(lens, dtype=torch.int32, device=device),
        keys,
        values,
    )


@pytest.fixture(scope="session")
def paged():
    return _paged


@pytest.fixture(scope="session")
def poisoned():
    """poisoned(shape, dtype, device): a buffer full of NaN, or of a bit pattern no result has."""

    def make(shape, dtype, device):
        value = torch.nan if dtype.is_floating_point else -858993460
        return torch.full(shape, value, dtype=dtype, device=device)

    return make

"""Devices, tolerances, and builders of poisoned inputs for the kernel tests.

The same test bodies run twice: in Triton's interpreter where there is no GPU, and compiled on CUDA where there is one
(marked ``gpu``). Whatever a kernel must not read is NaN or an index far out of range.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from specattn_vllm.cpu_runner.interpreter import leave_out_needless_work

HAS_CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    leave_out_needless_work()

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


# Numbers that inputs may have: any of float32, and often those with which something could go wrong.
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1.5e-39, 1.0, -1.0, 0.25, -0.25, 65504.0, 3e38, -3e38)


@pytest.fixture(scope="session")
def any_numbers():
    """any_numbers(data, shape): a tensor that hypothesis draws. All of its elements are the same, or few differ: there
    are ties."""
    one = st.sampled_from(SPECIAL) | st.floats(width=32)
    few = one.map(lambda value: [value]) | st.lists(one, min_size=1, max_size=5)

    def draw(data, shape) -> torch.Tensor:
        given = torch.tensor(data.draw(few), dtype=torch.float32)
        number = math.prod(shape)
        return given.repeat(-(-max(number, 1) // len(given)))[:number].view(shape)

    return draw


@pytest.fixture(scope="session")
def poisoned():
    """poisoned(shape, dtype, device): a buffer full of NaN, or of a bit pattern no result has."""

    def make(shape, dtype, device):
        value = torch.nan if dtype.is_floating_point else -858993460
        return torch.full(shape, value, dtype=dtype, device=device)

    return make


@dataclass
class DraftBatch:
    """Arguments of the operation, and the keys and values behind them."""

    data: object
    query: torch.Tensor
    starts: torch.Tensor
    scored: torch.Tensor
    longest_query: int

    def args(self, out, scale=None):
        scale = self.query.shape[-1] ** -0.5 if scale is None else scale
        return self.query, self.data.kv_cache, self.data.block_table, self.data.seq_lens, self.starts, scale, out


def _scored_rows(starts, q_lens, per_request):
    """One: the last token of each request, or the one before it, or in every fourth request none. Two: the first and
    the last in either order, which are the same in a request of one token, or the last alone."""
    rows = []
    for r, (begin, q) in enumerate(zip(starts, q_lens, strict=True)):
        last = begin + q - 1
        if q == 0:
            rows.append([-1] * per_request)
        elif per_request == 1:
            rows.append([-1 if r % 4 == 3 else max(last - r % 2, begin)])
        else:
            rows.append([[begin, last], [-1, last], [last, begin]][r % 3])
    return rows


@dataclass
class Drafting:
    """Builds batches for ``draft_attention``, runs an implementation on one, and compares two runs."""

    paged: Callable
    poisoned: Callable
    close: Callable

    def build(self, params, device, dtype, per_request=1):
        lens, q_lens, heads, ratio, size, block_size, layout = params
        data = self.paged(lens, heads, size, block_size, layout, device, dtype)
        gen = torch.Generator().manual_seed(1)
        query = (2 * torch.randn(sum(q_lens) + 3, heads * ratio, size, generator=gen)).to(dtype)
        query[sum(q_lens) :] = torch.nan  # rows of a padded batch belong to nobody
        starts = torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0).int()
        scored = torch.tensor(_scored_rows(starts[:-1].tolist(), q_lens, per_request), device=device)
        return DraftBatch(data, query.to(device), starts.to(device), scored, max(1, *q_lens))

    def run(self, op, batch, width, score_dtype=torch.float32, scale=None, with_out=True, **more):
        """out, scores, lse of one call into poisoned buffers."""
        q, rows = batch.query, batch.starts.shape[0] - 1
        out = self.poisoned(q.shape, q.dtype, q.device) if with_out else None
        scored = batch.scored.shape[1] * q.shape[1]
        scores = self.poisoned((rows, scored, width), score_dtype, q.device)
        lse = self.poisoned((rows, scored), torch.float32, q.device)
        op(*batch.args(out, scale), batch.scored, scores, lse, batch.longest_query, **more)
        return out, scores, lse

    def check(self, batch, got, want, dtype, kind=None):
        """Everything written agrees, and what the reference left poisoned the kernel did, too."""
        (out, scores, lse), (want_out, want_scores, want_lse) = got, want
        kind = kind or ("scores", dtype)
        if out is not None:
            used = int(batch.starts[-1])
            self.close("out", out[:used], want_out[:used], dtype)
            assert out[used:].isnan().all()
        by_row = (batch.data.kv_cache.shape[1], batch.scored.shape[1], -1)
        for r, rows in enumerate(batch.scored.tolist()):
            written = want_scores[r].isfinite()
            assert torch.equal(scores[r].isfinite(), written), f"scores of request {r}"
            self.close(kind[0], scores[r][written], want_scores[r][written], kind[1])
            for c, row in enumerate(rows):
                got_lse, wanted_lse = lse[r].view(by_row)[:, c], want_lse[r].view(by_row)[:, c]
                if row < 0:
                    assert got_lse.isnan().all() and not written.unflatten(0, by_row)[:, c].any()
                else:
                    self.close("lse", got_lse, wanted_lse)


@pytest.fixture(scope="session")
def drafting(paged, poisoned, close):
    return Drafting(paged, poisoned, close)

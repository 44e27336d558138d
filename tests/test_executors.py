"""Executors: which one runs where, and that one that cannot run is refused rather than replaced."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from specattn_vllm.executors import ExecutorError, Operations, resolve, write_kv

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_torch_is_refused_off_the_cpu():
    with pytest.raises(ExecutorError, match="executor = 'torch' runs on CPU, not on cuda: use 'auto' or 'triton'"):
        resolve("torch", CUDA)


@pytest.mark.parametrize("value", [None, "0", ""])
def test_triton_on_cpu_is_refused_without_the_interpreter(monkeypatch, value):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(ExecutorError, match=r"'triton' on cpu needs .*TRITON_INTERPRET=1.*use 'auto' or 'torch'"):
        resolve("triton", CPU)


# Not set here: a kernel that is declared with it set stays interpreted, for the GPU tests of this process too.
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set from the start")
def test_triton_on_cpu_runs_the_kernels_through_the_interpreter():
    pytest.importorskip("triton")
    operations = resolve("triton", CPU)
    assert operations.name == "triton"
    for name in ("decode_attention", "accumulate_mass", "select_top_p", "build_page_tables", "sparse_attention"):
        module = getattr(operations, name).__module__
        assert module.startswith("specattn_vllm.kernels.")
        assert not module.endswith(".reference")
    # These two have no kernel of ours: on CPU they are the reference's.
    assert operations.write_kv is write_kv
    assert operations.dense_attention is resolve("torch", CPU).dense_attention


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_auto_on_cpu_is_torch_even_with_the_interpreter(monkeypatch, interpret):
    # The interpreter is for tests: it is slower than torch by orders of magnitude.
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert resolve("auto", CPU) == resolve("torch", CPU)
    assert resolve("auto", CPU).name == "torch"


def test_torch_runs_the_reference_for_every_operation():
    operations = resolve("torch", CPU)
    for field in dataclasses.fields(Operations):
        if field.name not in ("name", "write_kv", "dense_attention"):
            function = getattr(operations, field.name)
            assert (function.__module__, function.__name__) == ("specattn_vllm.kernels.reference", field.name)


# write_kv

BLOCKS, HEADS, TOKENS, SIZE = 3, 2, 4, 8
LAYOUTS = {
    "LBNHC": lambda dtype: torch.full((BLOCKS, TOKENS, HEADS, 2 * SIZE), 99.0, dtype=dtype).transpose(1, 2),
    "LBHNC": lambda dtype: torch.full((BLOCKS, HEADS, TOKENS, 2 * SIZE), 99.0, dtype=dtype),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[5, 0, 11, 6], [5, -1, 11, -1], [-1, -1], [2], []])
def test_keys_and_values_land_in_their_slots_and_nowhere_else(layout, dtype, slots):
    cache = LAYOUTS[layout](dtype)
    # vLLM's batches are padded: more rows than slots, and negative slots.
    key, value = torch.randn(len(slots) + 2, HEADS, SIZE), torch.randn(len(slots) + 2, HEADS, SIZE)
    wanted = torch.full((BLOCKS, HEADS, TOKENS, 2 * SIZE), 99.0, dtype=dtype)
    for t, slot in enumerate(slots):
        if slot >= 0:
            wanted[slot // TOKENS, :, slot % TOKENS, :SIZE] = key[t].to(dtype)
            wanted[slot // TOKENS, :, slot % TOKENS, SIZE:] = value[t].to(dtype)
    write_kv(key, value, cache, torch.tensor(slots, dtype=torch.int64))
    assert torch.equal(cache, wanted)


def test_dense_attention_is_causal_attention_over_the_whole_cache():
    torch.manual_seed(0)
    cache = torch.randn(BLOCKS, HEADS, TOKENS, 2 * SIZE)
    block_table = torch.tensor([[2, 0], [1, 1_000_000]], dtype=torch.int32)
    lens, query_lens = [7, 3], [2, 1]
    query, out = torch.randn(3, 2 * HEADS, SIZE), torch.full((3, 2 * HEADS, SIZE), torch.nan)
    starts = torch.tensor([0, 2, 3], dtype=torch.int32)
    resolve("torch", CPU).dense_attention(
        query, cache, block_table, torch.tensor(lens, dtype=torch.int32), starts, 0.3, out, 2, 7
    )
    token = 0
    for r, (length, count) in enumerate(zip(lens, query_lens, strict=True)):
        rows = [cache[block_table[r, p // TOKENS], :, p % TOKENS] for p in range(length)]
        for i in range(count):
            visible = torch.stack(rows[: length - count + i + 1])
            for h in range(2 * HEADS):
                keys, values = visible[:, h // 2, :SIZE], visible[:, h // 2, SIZE:]
                weights = (0.3 * keys @ query[token, h]).softmax(0)
                torch.testing.assert_close(out[token, h], weights @ values, rtol=1e-5, atol=1e-5)
            token += 1

"""Executors: which one runs where, and that one that cannot run is refused rather than replaced."""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from types import SimpleNamespace

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.executors import ExecutorError, Operations, fa3, resolve, write_kv
from specattn_vllm.options import ExecutorName, SpecAttnOptions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPERATIONS = {field.name for field in dataclasses.fields(Operations)} - {"name", "granularity", "graphs", "label"}


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
    assert (operations.granularity, operations.graphs) == ("token", False)
    for name in OPERATIONS - {"write_kv", "dense_attention"}:
        function = getattr(operations, name)
        assert function.__name__ == name
        assert function.__module__.startswith("specattn_vllm.kernels.")
        assert not function.__module__.endswith("reference")
    # These two have no kernel of ours: on CPU they are the reference's.
    assert operations.write_kv is write_kv
    assert operations.dense_attention is resolve("torch", CPU).dense_attention


@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_on_cpu_is_torch_even_with_the_interpreter(monkeypatch, interpret, dtype):
    # The interpreter is for tests: it is slower than torch by orders of magnitude.
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert resolve("auto", CPU, dtype) == resolve("torch", CPU, dtype)
    assert resolve("auto", CPU, dtype).name == "torch"


def test_torch_runs_the_reference_for_every_operation():
    operations = resolve("torch", CPU)
    assert (operations.granularity, operations.graphs) == ("token", False)
    for name in OPERATIONS - {"write_kv", "dense_attention"}:
        function = getattr(operations, name)
        assert function.__name__ == name
        package, _, module = function.__module__.rpartition(".")
        assert package.startswith("specattn_vllm.kernels.") and module == "reference"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set from the start")
@pytest.mark.parametrize("name", sorted(OPERATIONS - {"write_kv", "dense_attention"}))
def test_executors_take_the_same_arguments(name):
    """Whatever one of them is called with fits the others; a kernel may take more, which nobody has to give."""
    torch_s, triton_s = (inspect.signature(getattr(resolve(e, CPU), name)).parameters for e in ("torch", "triton"))
    shared = [*triton_s][: len(torch_s)]
    assert shared == [*torch_s]
    assert [triton_s[n].default for n in shared] == [p.default for p in torch_s.values()]
    assert all(p.default is not p.empty for n, p in triton_s.items() if n not in shared)


# Other libraries' attention


@pytest.mark.parametrize("name", ["fa3", "xformers"])
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_borrowed_executors_are_refused_on_cpu(monkeypatch, name, interpret):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(ExecutorError) as caught:
        resolve(name, CPU)
    assert str(caught.value) == f"executor = {name!r}: runs on NVIDIA GPUs, not on cpu; or use 'auto' or 'triton'"


@pytest.mark.parametrize("name", ["fa3", "xformers"])
def test_borrowed_executors_are_refused_in_fp32(name):
    with pytest.raises(ExecutorError) as caught:
        resolve(name, CUDA, torch.float32)
    assert str(caught.value) == (
        f"executor = {name!r}: runs models in float16 and bfloat16, not in float32: set --dtype; or use 'auto' or "
        "'triton'"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, where either may run")
@pytest.mark.parametrize("name", ["fa3", "xformers"])
def test_a_library_that_is_missing_is_named(name):
    pytest.importorskip("vllm")
    with pytest.raises(ExecutorError, match=rf"executor = '{name}': .+; or use 'auto' or 'triton'"):
        resolve(name, CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    ("runs", "dtype", "chosen"),
    [
        ({"fa3", "xformers"}, torch.bfloat16, "fa3"),
        ({"fa3"}, torch.float16, "fa3"),
        ({"xformers"}, torch.bfloat16, "triton"),  # four times as slow on an H200: runs if it is asked for
        (set(), torch.bfloat16, "triton"),
        ({"fa3", "xformers"}, torch.float32, "triton"),  # not asked: neither takes it
    ],
)
def test_auto_on_a_gpu_takes_the_best_that_runs(monkeypatch, runs, dtype, chosen):
    unavailable = executors._unavailable

    def some(name, device, dtype):
        if dtype == torch.float32:
            return unavailable(name, device, dtype)
        return None if name in runs else "does not run"

    monkeypatch.setattr(executors, "_unavailable", some)
    monkeypatch.setattr(executors, "_triton_operations", lambda device: "triton")
    monkeypatch.setattr(executors, "_borrowed_operations", lambda name, device, own_sparse: name)
    assert resolve("auto", CUDA, dtype) == chosen


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set from the start")
def test_fa3_replaces_attention_and_leaves_the_rest_to_the_kernels():
    ours, theirs = resolve("triton", CPU), executors._borrowed_operations("fa3", CPU)
    changed = {f.name for f in dataclasses.fields(Operations) if getattr(ours, f.name) != getattr(theirs, f.name)}
    assert changed == {"name", "sparse_attention", "dense_attention", "graphs"}
    assert (theirs.name, theirs.granularity, theirs.graphs) == ("fa3", "token", True)
    assert theirs.dense_attention is fa3.dense_attention


@pytest.mark.parametrize(
    ("name", "options", "own"),
    [
        ("auto", {}, False),
        ("auto", {"method": "sketch"}, True),
        ("auto", {"method": "sts"}, True),
        ("auto", {"method": "vegas"}, False),
        ("auto", {"preset": "paper"}, False),
        ("fa3", {}, False),
        ("fa3", {"method": "sts"}, False),
    ],
)
def test_our_kernel_reads_selections_where_it_is_faster_and_nobody_asked_for_another(monkeypatch, name, options, own):
    attended = []
    monkeypatch.setattr(executors, "_unavailable", lambda name, device, dtype: None)
    monkeypatch.setattr(executors, "_triton_operations", lambda device: resolve("torch", CPU))
    monkeypatch.setattr(fa3, "sparse_attention", lambda *given: attended.append(given))
    options = SpecAttnOptions.parse({"executor": name, **({"method": "specattn"} | options)})
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto"), model_config=SimpleNamespace(dtype=torch.bfloat16)
    )
    operations = executors.of_engine(options, CUDA, config)
    assert operations.name == "fa3" and operations.dense_attention is fa3.dense_attention
    assert operations.label == ("fa3, and triton for selections" if own else "")
    if own:
        assert operations.sparse_attention is resolve("torch", CPU).sparse_attention
    else:
        operations.sparse_attention(*"qctksfom")
        assert attended == [(*"qctksfom",)]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set from the start")
def test_xformers_reads_whole_blocks():
    ours, theirs = resolve("triton", CPU), executors._borrowed_operations("xformers", CPU)
    changed = {f.name for f in dataclasses.fields(Operations) if getattr(ours, f.name) != getattr(theirs, f.name)}
    assert changed - {"dense_attention", "graphs"} == {"name", "sparse_attention", "build_page_tables", "granularity"}
    assert (theirs.name, theirs.granularity) == ("xformers", "block")


def test_blocks_hold_no_selections_per_head():
    message = r"'xformers' reads whole blocks.* methods 'sketch' and 'sts' choose.*'triton'"
    with pytest.raises(ExecutorError, match=message):
        resolve("xformers", CUDA, per_head=True)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set from the start")
def test_the_executors_of_blocks_are_those_whose_operations_say_so():
    made = {name: executors._borrowed_operations(name, CPU) for name in ("fa3", "xformers")}
    assert tuple(name for name, operations in made.items() if operations.granularity == "block") == executors.BLOCKS


def test_the_names_are_those_of_the_option():
    assert set(executors.CHOICES) == set(typing.get_args(ExecutorName))


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

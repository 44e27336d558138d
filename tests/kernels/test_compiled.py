"""Kernels that have not run on a GPU at least compile for one: Triton needs none for that, but its interpreter off."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specattn_vllm.kernels.attention import draft_attention, draft_kernel, sparse_attention
from specattn_vllm.kernels.bookkeeping import kernels as bookkeeping
from specattn_vllm.kernels.guarantee import bound, sample
from specattn_vllm.kernels.padding import padded
from specattn_vllm.kernels.sketch import encode
from specattn_vllm.kernels.selection import mass, page_tables, top_p

POINTERS = {
    "kv_cache": "D", "slots": "i64", "lens": "i32", "query": "D", "out": "D", "lse": "fp32", "kept": "i32",
    "query_start_loc": "i32", "part_acc": "fp32", "part_lse": "fp32", "page_table": "i32", "block_table": "i32",
    "seq_lens": "i32", "requests": "i64", "scored_rows": "i64", "scores": "bf16", "mass": "fp32", "bits": "i32",
    "counts": "i32", "prefix_lens": "i32", "sources": "i32", "groups": "i32", "prefilling": "i1", "usable": "i32",
    "stored": "i32", "layers_of": "i64", "histogram": "i32", "chunks": "i16", "cuts": "i32", "starts": "i32",
    "table": "i64", "positions": "i32", "worth": "fp32",
}
SCALARS = {
    "log2_scale": "fp32", "scale": "fp32", "weight": "fp32", "soft_cap": "fp32",
    **dict.fromkeys(("head_rows", "num_query_heads", "block_size", "per_block", "per_head", "per_token", "words",
                     "width", "heads", "rows", "entries", "shared_by", "layers", "dense_layers", "p_fixed", "f_fixed",
                     "min_tokens", "max_tokens", "sink", "recent"), "i32"),
}


def compiled(kernel, dtype, warps, given=(), **constants):
    types = dict(given)
    for name in kernel.arg_names:
        if name in types:
            continue
        if name in constants:
            types[name] = "constexpr"
        elif name in POINTERS:
            types[name] = "*" + POINTERS[name].replace("D", dtype)
        else:
            types[name] = SCALARS.get(name, "i64")
    types = {name: types[name] for name in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in types}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": warps}).asm["cubin"]
    print(kernel.__name__, dtype)


EIGHT = {"kv_cache": "*fp8e4nv"}
# GPUs before capability 89 have no 8-bit floats.
eight = [("bf16", 96, 2, EIGHT)] if CAPABILITY >= 89 else []
for dtype, size, group, cache in (("bf16", 128, 4, {}), ("fp16", 64, 1, {}), ("bf16", 192, 4, {}), *eight):
    for lse, splits, tiles in ((False, 4, 1), (True, 4, 2), (True, 1, 1), (False, 1, 2)):
        config = sparse_attention.CONFIGS[padded(size), False]
        more = {"GROUP": group, "D": size, "SPLITS": splits, "soft_cap": None, **({} if lse else {"lse": None})}
        cap = {"soft_cap": "fp32"} if lse and splits == 1 else {}
        compiled(sparse_attention._sparse_kernel, dtype, config.num_warps, {"groups": "i32", **cache, **cap},
                 TILES=tiles, BLOCK_M=16, BLOCK=config.block_n, **more)
        if splits > 1:
            compiled(sparse_attention._combine_kernel, dtype, 1, {"groups": "i32"}, **more)
    # A draft's step, the same in parts, a verification with two scored rows, and an audit.
    for out, scores, c, splits, some in ((1, 1, 1, 1, 0), (1, 1, 1, 4, 0), (1, 1, 2, 4, 0), (0, 0, 1, 4, 1)):
        config = draft_attention.CONFIGS[padded(size), 32]
        given = {"out": out, "scores": scores, "requests": some, "soft_cap": some}
        shared = {"HEADS": 8, "GROUP": group, "C": c, "D": size, "SPLITS": splits,
                  **{name: None for name in given if not given[name]}}
        compiled(draft_kernel.draft_kernel, dtype, config.num_warps, cache, BLOCK_SIZE=16, TILES=1, BLOCK_M=32,
                 BLOCK=config.block_n, SMALL_DOT=bool(out) and c * group <= 16, **shared)
        if splits > 1:
            compiled(draft_kernel.combine_tokens, dtype, 4, ROWS=4, **shared)
for combine in ("store", "add"):
    compiled(mass._mass_kernel, "fp32", 1, HEADS=8, STEP=8, COMBINE=combine, BLOCK=256, ALIGNED=True)
for weighed, counted, union in ((True, False, True), (False, True, False), (True, True, False)):
    compiled(top_p._top_p_kernel, "fp32", 32, {"counts": "*i32"}, WEIGHED=weighed, COUNTED=counted, UNION=union,
             FUSED=True, VECTOR=4, SMALL=4096, SIZE=32768, LONGER=True, TILE=4096, STAGES=3)
for mapped in (False, True):
    compiled(page_tables._page_table_kernel, "fp32", 8, CHUNK=4096, COUNT_STEP=1024,
             **({} if mapped else {"sources": None, "groups": None}))
for dtype, size, draws in (("bf16", 128, 64), ("fp16", 64, 32), ("bf16", 96, 128), ("bf16", 256, 256)):
    for cache in [{}, EIGHT][: 1 + len(eight)]:
        compiled(bound._bound_kernel, dtype, bound.NUM_WARPS, {"lost": "*fp32", "quantile": "fp32", **cache}, GROUP=4,
                 D=size, DRAWS=draws, BLOCK_M=32, TILES=1)
    of_keys = {"key": "*D", "slot_mapping": "*i64", "rotation": "*D", "centre": "*fp32", "codes": "*u8",
               "scales": "*fp16", "value": "*D", "tokens": "i32",
               **dict.fromkeys(("norm", "step_size", "key_scale", "value_scale"), "fp32")}
    of_keys = {name: kind.replace("D", dtype) for name, kind in of_keys.items()}
    for cache in [{}, EIGHT][: 1 + len(eight)]:
        compiled(encode._encode_kernel, dtype, 4, of_keys | cache, D=size, BITS=2, C=size // 4, BLOCK=encode.BLOCK,
                 FP8=bool(cache))
    compiled(sample._sample_kernel, dtype, sample.NUM_WARPS, {"scores": "*u8", "layer": "i32"}, BINS=256, CHUNK=2048,
             CHUNKS=sample.CHUNKS, DRAWS=draws, PART=10, BITS=20)
compiled(bookkeeping._count_reads_kernel, "fp32", 8, {"groups": "i32", "out": "*i64"}, ROWS=64, ENTRIES=32,
         NO_SELECTION_CODE=-1)
compiled(bookkeeping._start_kernel, "fp32", 1, {"began": "*i64"})
compiled(bookkeeping._stop_kernel, "fp32", 1, {"began": "*i64", "times": "i32", "total": "*i64"})
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = PROGRAM.replace("CAPABILITY", str(capability))
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == (61 if capability < 89 else 82)

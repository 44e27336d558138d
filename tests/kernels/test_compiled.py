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
from specattn_vllm.kernels.attention import sparse_attention

POINTERS = {
    "kv_cache": "D", "slots": "i64", "lens": "i32", "query": "D", "out": "D", "lse": "fp32", "kept": "i32",
    "query_start_loc": "i32", "part_acc": "fp32", "part_lse": "fp32", "page_table": "i32",
}
SCALARS = {"log2_scale": "fp32", "head_rows": "i32", "num_query_heads": "i32", "groups": "i32"}


def compiled(kernel, dtype, warps, **constants):
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in POINTERS:
            types[name] = "*" + POINTERS[name].replace("D", dtype)
        else:
            types[name] = SCALARS.get(name, "i64")
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": warps}).asm["cubin"]
    print(kernel.__name__, dtype)


for dtype, size, group in (("bf16", 128, 4), ("fp16", 64, 1)):
    for lse, splits, tiles in ((False, 4, 1), (True, 4, 2), (True, 1, 1), (False, 1, 2)):
        config = sparse_attention.CONFIGS[size, False]
        more = {"GROUP": group, "D": size, "SPLITS": splits, "HAS_LSE": lse}
        compiled(sparse_attention._sparse_kernel, dtype, config.num_warps, TILES=tiles, BLOCK_M=config.block_m,
                 BLOCK=config.block_n, **more)
        if splits > 1:
            compiled(sparse_attention._combine_kernel, dtype, 1, **more)
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = PROGRAM.replace("CAPABILITY", str(capability))
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 12

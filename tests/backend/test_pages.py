"""The size of the pages that vLLM plans with."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.kv_cache_interface import FullAttentionSpec

from specattn_vllm.backend.backend import SpecAttnBackend
from specattn_vllm.backend.impl import SpecAttnImpl


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("heads", "size"), [(1, 256), (2, 256), (8, 128), (3, 96)])
@pytest.mark.parametrize("tokens", [16, 96, 544, 1056])
def test_a_token_s_page_is_a_block_s_share(heads, size, dtype, bits, tokens, monkeypatch):
    """For hybrid models vLLM takes as many tokens to a block as a state is large, by the page of one token."""
    monkeypatch.setattr(SpecAttnImpl, "sketch_bits", bits)
    spec = {"num_kv_heads": heads, "head_size": size, "dtype": dtype}
    one, block = (SpecAttnBackend.customize_spec(FullAttentionSpec(block_size=n, **spec)) for n in (1, tokens))
    row = 2 * size * dtype.itemsize
    assert one.page_size_bytes * tokens <= block.page_size_bytes < one.page_size_bytes * tokens + row
    assert block.page_size_bytes % row == 0

"""draft_attention: memory of any layout and of more than 2^31 elements, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.attention.draft_attention import draft_attention

OPS = pytest.mark.parametrize("op", [draft_attention, reference.draft_attention], ids=["kernel", "reference"])


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_reference_with_blocks_in_order(layout, paged, poisoned, close):
    """The reference reads such blocks in place instead of copying them."""
    cpu = torch.device("cpu")
    lens = [33, 100, 16]
    data = paged(lens, 2, 64, 16, layout, cpu, torch.float32, in_order=True)
    query = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(1))
    out = poisoned(query.shape, torch.float32, cpu)
    starts = torch.arange(4, dtype=torch.int32)
    reference.draft_attention(query, data.kv_cache, data.block_table, data.seq_lens, starts, 0.125, out)
    for r in range(3):
        k, v = (t[r].repeat_interleave(2, 0) for t in (data.keys, data.values))
        close("out", out[r], F.scaled_dot_product_attention(query[r][:, None], k, v)[:, 0], torch.float32)


@OPS
def test_blocks_beyond_2_31_elements(op, device, poisoned, close):
    """block * block stride overflows int32 here. The cache is virtual memory but for the two blocks written."""
    cache = torch.empty(2**20 + 8, 1, 16, 128, dtype=torch.float16, device=device)
    blocks = [2**20 + 5, 2]
    assert blocks[0] * cache.stride(0) > 2**31
    tokens = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0)).half().to(device)
    for block, content in zip(blocks, tokens, strict=True):
        cache[block, 0] = content
    tokens = tokens.flatten(0, 1)[:20].float()
    query = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1)).half().to(device)
    values = ([blocks], [20], [0, 1])
    table, lens, starts = (torch.tensor(v, dtype=torch.int32, device=device) for v in values)
    out = poisoned(query.shape, torch.float16, device)
    op(query, cache, table, lens, starts, 0.125, out)
    weights = (query[0].float() @ tokens[:, :64].T * 0.125).softmax(-1)
    close("out", out[0], weights @ tokens[:, 64:], torch.float16)


def test_scores_beyond_2_31_elements(device, drafting, poisoned, close):
    """row * row stride of the scores overflows int32; virtual memory but for what is written."""
    batch = drafting.build(([5, 7, 9], [1, 1, 1], 1, 2, 64, 16, "LBNHC"), device, torch.float32)
    scores = torch.empty(3, 2, 3 * 2**28, dtype=torch.bfloat16, device=device)
    lse = poisoned((3, 2), torch.float32, device)
    assert 2 * scores.stride(0) > 2**31
    draft_attention(*batch.args(None), batch.scored, scores, lse)
    want = drafting.run(reference.draft_attention, batch, 16)
    close("bf16 scores", scores[2, :, :9], want[1][2, :, :9])


@OPS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"seq_lens": torch.ones(2, dtype=torch.int64)}, "seq_lens: got torch.int64, wanted torch.int32"),
        ({"out": None}, "out: got None without scores"),
        ({"scores": torch.empty(2, 4, 8)}, "lse: got None, wanted a tensor"),
        ({"lse": torch.empty(2, 4)}, "scored_rows: got None, wanted a tensor"),
        ({"scored_rows": torch.zeros(2, 1, dtype=torch.int32)}, "scored_rows: got torch.int32"),
        ({"scored_rows": torch.zeros(2, dtype=torch.int64)}, r"scored_rows: got shape \(2,\), wanted .*\(2, 'any'\)"),
        ({"scored_rows": torch.zeros(2, 3, dtype=torch.int64)}, "scored_rows: got 3 rows per request, wanted 1 or 2"),
        (
            {"scored_rows": torch.zeros(2, 2, dtype=torch.int64), "lse": torch.empty(2, 4)},
            r"lse: got shape \(2, 4\), wanted shape \(2, 8\)",
        ),
        ({"block_table": torch.zeros(3, 4, dtype=torch.int32)}, r"seq_lens: got shape \(2,\)"),
        ({"query_start_loc": torch.zeros(2, dtype=torch.int32)}, r"query_start_loc: got shape \(2,\)"),
        ({"query": torch.empty(2, 3, 64), "out": torch.empty(2, 3, 64)}, "kv_cache: got 2 heads for 3 query heads"),
        ({"kv_cache": torch.empty(4, 2, 256, 16).transpose(2, 3)}, "kv_cache: got .*"),
        ({"requests": torch.zeros(1, dtype=torch.int32)}, "requests: got torch.int32, wanted torch.int64"),
    ],
    ids=[
        "dtype", "nothing asked", "scores without lse", "lse without row", "row dtype", "rows flat",
        "three rows", "lse of one row", "row count", "starts",
        "uneven heads", "cache shape", "requests dtype",
    ],
)  # fmt: skip
def test_refuses(op, change, message):
    good = {
        "query": torch.empty(2, 4, 64), "kv_cache": torch.empty(4, 2, 16, 128),
        "block_table": torch.zeros(2, 2, dtype=torch.int32), "seq_lens": torch.ones(2, dtype=torch.int32),
        "query_start_loc": torch.arange(3, dtype=torch.int32), "scale": 1.0, "out": torch.empty(2, 4, 64),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})


def test_kernel_refuses_untuned_head_size():
    q = torch.empty(1, 1, 32)
    one = torch.ones(1, dtype=torch.int32)
    starts = torch.arange(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="head size 32"):
        draft_attention(q, torch.empty(1, 1, 16, 64), one[None], one, starts, 1.0, torch.empty_like(q))

"""dense_attention and unpack_bits, which have no kernel: the reference against torch and plain Python."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels import reference


def case(why, q_lens, seq_lens, heads=2, ratio=2, size=64, block_size=16, layout="LBNHC"):
    return pytest.param((q_lens, seq_lens, heads, ratio, size, block_size, layout), id=why)


CASES = [
    case("one token", [1], [1]),
    case("whole prompt: square causal", [33], [33]),
    case("chunk of a prompt", [20], [127]),
    case("decode rows", [1, 1, 1], [15, 16, 17], layout="LBHNC"),
    case("mixed chunk, decode and square", [40, 1, 17], [64, 129, 17]),
    case("padded rows", [3, 0, 2], [10, 0, 31]),
    case("request without a query", [3, 0], [10, 40]),
    case("head size 256", [7, 1], [130, 9], size=256),
    case("GQA 8, head size 128, big page", [7], [130], heads=1, ratio=8, size=128, block_size=128),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("params", CASES)
def test_matches_plain_softmax(params, dtype, paged, poisoned, close):
    q_lens, seq_lens, heads, ratio, size, block_size, layout = params
    cpu = torch.device("cpu")
    data = paged(seq_lens, heads, size, block_size, layout, cpu, dtype)
    starts = torch.tensor([0, *q_lens]).cumsum(0).int()
    query = torch.randn(sum(q_lens) + 2, heads * ratio, size, generator=torch.Generator().manual_seed(5)).to(dtype)
    out = poisoned(query.shape, dtype, cpu)
    reference.dense_attention(query, data.kv_cache, data.block_table, data.seq_lens, starts, 0.2, out)
    written = torch.zeros(query.shape[0], dtype=torch.bool)
    for r in range(len(q_lens)):
        mine = slice(int(starts[r]), int(starts[r + 1]))
        written[mine] = True
        k = data.keys[r].float().repeat_interleave(ratio, 0)
        v = data.values[r].float().repeat_interleave(ratio, 0)
        logits = query[mine].float().transpose(0, 1) @ k.transpose(1, 2) * 0.2
        for i in range(q_lens[r]):
            logits[:, i, seq_lens[r] - q_lens[r] + i + 1 :] = -torch.inf
        close("out", out[mine], (logits.softmax(-1) @ v).transpose(0, 1), dtype)
    assert out[~written].isnan().all()


def test_agrees_with_sparse_attention_on_a_full_table(paged, close):
    """The two executors share the rows of one batch, so they have to mean the same by 'causal'."""
    cpu = torch.device("cpu")
    lens, q_lens = [50, 77], [4, 1]
    data = paged(lens, 2, 64, 16, "LBNHC", cpu, torch.float32)
    starts = torch.tensor([0, 4, 5], dtype=torch.int32)
    query = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(6))
    dense, sparse = torch.empty_like(query), torch.empty_like(query)
    table, kept = torch.zeros(1, 2, 1, 77, dtype=torch.int32), torch.zeros(1, 2, 1, dtype=torch.int32)
    everything = torch.full((2,), -1, dtype=torch.int32)
    bits, slots = torch.zeros(1, 2, 1, 3, dtype=torch.int32), torch.tensor([0, 1])
    reference.build_page_tables(
        bits, slots, everything, data.seq_lens, data.block_table, 16, data.page_strides, table, kept
    )
    reference.sparse_attention(query, data.kv_cache, table[0], kept[0], starts, 0.125, sparse, max(q_lens))
    reference.dense_attention(query, data.kv_cache, data.block_table, data.seq_lens, starts, 0.125, dense)
    close("out", sparse, dense, torch.float32)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64])
def test_unpack_bits(length):
    """Sign bit included; words past the length are ignored."""
    words = [-(2**31) + 5, 0x40000001, -1]
    bits = torch.tensor([words, words[::-1]], dtype=torch.int32).view(2, 1, 3)
    flags = reference.unpack_bits(bits, length)
    assert flags.shape == (2, 1, length) and flags.dtype == torch.bool
    want = [bool(words[p // 32] >> (p % 32) & 1) for p in range(length)]
    assert flags[0, 0].tolist() == want

"""Attention with sinks is softmax with one more logit, whose value is nothing."""

import pytest
import torch

from specattn_vllm.kernels.attention.reference import dense_attention
from specattn_vllm.kernels.attention.sinks import weigh_against_sinks
from specattn_vllm.sketch.layer import attend_densely

HEADS, GROUP, SIZE = 2, 3, 64


def with_a_sink(query, key, value, sinks, scale, window=None):
    """query [T, Hq, D], key and value [L, H, D], the last T of L: the softmax over tokens and sink, token by token."""
    out = torch.empty_like(query)
    new, length = len(query), len(key)
    for i in range(new):
        end = length - new + i + 1
        first = 0 if window is None else max(0, end - window)
        for head in range(query.shape[1]):
            logits = key[first:end, head // GROUP] @ query[i, head] * scale
            weights = torch.cat((logits, sinks[head : head + 1])).softmax(0)[:-1]
            out[i, head] = weights @ value[first:end, head // GROUP]
    return out


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return draw


def test_what_is_attended_to_weighs_less():
    out, lse, sinks = (
        torch.ones(3, 2, 4),
        torch.tensor([[0.0, 5.0], [-torch.inf, 1.0], [2.0, 1.0]]),
        torch.tensor([0.0, 1.0]),
    )
    weigh_against_sinks(out, lse, sinks)
    expected = torch.tensor(
        [[0.5, torch.sigmoid(torch.tensor(4.0))], [0.0, 0.5], [torch.sigmoid(torch.tensor(2.0)), 0.5]]
    )
    torch.testing.assert_close(out, expected[..., None].expand(3, 2, 4))
    without = torch.ones(3, 2, 4)
    weigh_against_sinks(without, lse.clamp(min=0), torch.full((2,), -torch.inf))
    assert torch.equal(without, torch.ones(3, 2, 4)), "a sink of no weight changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_attention_of_ragged_rows(drawn, dtype):
    lengths, new, size = [5, 40, 33, 7], [5, 3, 1, 0], 16
    blocks = sum(-(-length // size) for length in lengths)
    kv_cache = drawn(blocks, HEADS, size, 2 * SIZE).to(dtype)
    table, first = torch.zeros(4, 4, dtype=torch.int32), 0
    for row, length in enumerate(lengths):
        count = -(-length // size)
        table[row, :count] = torch.arange(first, first + count)
        first += count
    query, sinks = drawn(sum(new), HEADS * GROUP, SIZE).to(dtype), drawn(HEADS * GROUP).to(dtype)
    starts = torch.tensor([0, *new]).cumsum(0).int()
    out = torch.zeros_like(query)
    dense_attention(query, kv_cache, table, torch.tensor(lengths).int(), starts, 0.3, out, sinks)
    for row, length in enumerate(lengths):
        kv = kv_cache[table[row].long()].transpose(1, 2).flatten(0, 1)[:length].float()
        rows = slice(int(starts[row]), int(starts[row + 1]))
        expected = with_a_sink(query[rows].float(), kv[..., :SIZE], kv[..., SIZE:], sinks.float(), 0.3)
        torch.testing.assert_close(
            out[rows].float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2
        )


@pytest.mark.parametrize("window", [None, 5])
def test_attention_without_a_cache(drawn, window):
    query, key, value = drawn(12, HEADS * GROUP, SIZE), drawn(12, HEADS, SIZE), drawn(12, HEADS, SIZE)
    sinks, out = drawn(HEADS * GROUP), torch.empty(12, HEADS * GROUP * SIZE)
    attend_densely(query, key, value, 0.2, out, head_size=SIZE, window=window, sinks=sinks)
    expected = with_a_sink(query, key, value, sinks, 0.2, window)
    torch.testing.assert_close(out.view_as(expected), expected, atol=1e-5, rtol=1e-5)

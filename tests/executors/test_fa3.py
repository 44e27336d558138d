"""FlashAttention 3 on our page tables: what it is handed, with a loop of the same contract in its place."""

from __future__ import annotations

import itertools

import pytest
import torch

from specattn_vllm.executors import fa3
from specattn_vllm.kernels import reference
from specattn_vllm.selection.pages import page_strides

ROWS_OF_QUERIES = {
    "uniform": [3, 3, 3],
    "single tokens": [1, 1, 1, 1],
    "ragged": [3, 1, 2],
    "one request": [4],
    "empty rows": [0, 2, 0, 3, 0],
    "empty rows at the end": [2, 2, 0, 0],
    "all empty": [0, 0],
    "empty, and as many as if uniform": [2, 0, 1],
}


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("lens", ROWS_OF_QUERIES.values(), ids=ROWS_OF_QUERIES.keys())
@pytest.mark.parametrize("padded", [0, 2])
@pytest.mark.parametrize("bound", [None, 8], ids=["longest", "bound"])
def test_head_major_lists_each_request_and_head_in_one_stretch(heads, lens, padded, bound):
    """Padded tokens stand behind the last request; the bound on the longest may be larger than it is."""
    tokens = sum(lens) + padded
    longest = bound or max(lens) or 2
    starts = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)
    wanted_order, wanted_starts = [], [0]
    for r, h in itertools.product(range(len(lens)), range(heads)):
        wanted_order += [t * heads + h for t in range(int(starts[r]), int(starts[r + 1]))]
        wanted_starts.append(len(wanted_order))
    order, stretches = fa3._head_major(starts, tokens, len(lens), heads, longest)
    assert (order.dtype, stretches.dtype) == (torch.int64, torch.int32)
    assert stretches.tolist() == wanted_starts
    assert order[: len(wanted_order)].tolist() == wanted_order
    # Padding lies behind all stretches, each row once, so that copying back touches nothing else.
    assert sorted(order.tolist()) == list(range(tokens * heads))


def test_a_graph_s_full_batch_counts_rows_that_have_no_tokens():
    """The batch was captured with as many tokens for each; what it is replayed with fills it from the front."""
    starts = torch.tensor([0, 3, 6, 6], dtype=torch.int32)
    order, stretches = fa3._head_major(starts, 9, 3, 2, 3)
    assert stretches.tolist() == [0, 3, 6, 9, 12, 15, 18]
    assert order[:12].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert sorted(order.tolist()) == list(range(18))


# A loop with FA3's contract


def attend(
    q,
    k,
    v,
    out,
    cu_seqlens_q,
    max_seqlen_q,
    seqused_k,
    max_seqlen_k,
    softmax_scale,
    block_table,
    return_softmax_lse=False,
    s_aux=None,
    softcap=0.0,
):
    """Causal attention over pages [P, N, H, D] as `flash_attn_varlen_func` does it, for fa_version=3, causal=True.
    s_aux [Hq]: a logit of each head that takes mass and has no value. softcap: of the logits, 0 for none.
    """
    assert k.shape == v.shape and k.shape[3] == q.shape[2]
    # A zero stride is refused by the tensor memory accelerator.
    assert all(k.stride()) and all(v.stride()) and k.stride(3) == v.stride(3) == q.stride(2) == 1
    assert cu_seqlens_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert block_table.shape[0] == seqused_k.shape[0] == cu_seqlens_q.shape[0] - 1
    assert block_table.stride(1) == 1 and out.shape == q.shape
    page_size, heads = k.shape[1:3]
    group = q.shape[1] // heads
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf)
    starts = cu_seqlens_q.tolist()
    for r, count in enumerate(seqused_k.tolist()):
        n = starts[r + 1] - starts[r]
        assert n <= max_seqlen_q and count <= max_seqlen_k
        places = [(int(block_table[r, j // page_size]), j % page_size) for j in range(count)]
        for i, h in itertools.product(range(n), range(q.shape[1])):
            seen = places[: max(count - (n - 1 - i), 0)]
            row = out[starts[r] + i, h]
            row.zero_()
            if seen:
                keys = torch.stack([k[p, o, h // group] for p, o in seen]).double()
                values = torch.stack([v[p, o, h // group] for p, o in seen]).double()
                logits = softmax_scale * keys @ q[starts[r] + i, h].double()
                logits = softcap * torch.tanh(logits / softcap) if softcap else logits
                sink = torch.tensor(-torch.inf if s_aux is None else float(s_aux[h]), dtype=torch.float64)
                weights = torch.cat((logits, sink[None])).softmax(0)[:-1]
                row.copy_(weights @ values)
                lse[h, starts[r] + i] = logits.logsumexp(0)
    return (out, lse) if return_softmax_lse else out


@pytest.fixture(autouse=True)
def loop(monkeypatch):
    monkeypatch.setattr(fa3, "_flash_attention", lambda: attend)


SIZE, SCALE = 64, 0.3
BLOCKS, BLOCK = 6, 4
LAYOUTS = {
    "LBNHC": lambda heads: torch.randn(3, BLOCKS, BLOCK, heads, 2 * SIZE)[1].transpose(1, 2),
    "LBHNC": lambda heads: torch.randn(3, BLOCKS, heads, BLOCK, 2 * SIZE)[1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "groups"), [(2, 1), (2, 2), (1, 1), (3, 3)])
@pytest.mark.parametrize("lens", [[2, 2, 2], [3, 1, 2], [1, 0, 2], [1, 1, 1]], ids=str)
@pytest.mark.parametrize(("with_lse", "cap"), [(False, None), (True, None), (True, 1.5)])
def test_sparse_attention_is_the_reference_s(layout, heads, groups, lens, with_lse, cap):
    torch.manual_seed(0)
    cache = LAYOUTS[layout](heads)
    block, head, token = page_strides(cache)
    rows, tokens, width = len(lens), sum(lens), 11
    page_table = torch.full((2, rows + 1, groups, width + 3), 10**6, dtype=torch.int32)[1, :rows, :, :width]
    kept = torch.randint(3, width + 1, (2, rows, groups), dtype=torch.int32)[0]
    for r, g in itertools.product(range(rows), range(groups)):
        places = torch.randperm(BLOCKS * BLOCK)[: int(kept[r, g])].sort().values
        page_table[r, g, : len(places)] = places // BLOCK * block + g * head + places % BLOCK * token
    starts = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)
    query = torch.randn(tokens, 2 * heads, SIZE)
    results = []
    for attention in (reference.sparse_attention, fa3.sparse_attention):
        out = torch.full_like(query, torch.nan)
        lse = torch.full((tokens, 2 * heads), torch.nan) if with_lse else None
        attention(query, cache, page_table, kept, starts, SCALE, out, max(lens), lse, cap)
        results.append((out, lse))
    (wanted, wanted_lse), (out, lse) = results
    assert not wanted.isnan().any()
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    if with_lse:
        torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_that_fill_a_graph_s_batch_get_zeros_and_disturb_nobody(groups):
    torch.manual_seed(0)
    cache = LAYOUTS["LBNHC"](2)
    block, head, token = page_strides(cache)
    page_table = torch.full((3, groups, 8), 10**6, dtype=torch.int32)
    for r, g, j in itertools.product(range(2), range(groups), range(8)):
        page_table[r, g, j] = (r + j) % BLOCKS * block + g * head + j % BLOCK * token
    kept = torch.tensor([[8], [5], [0]], dtype=torch.int32).expand(3, groups).contiguous()
    query = torch.randn(9, 4, SIZE)
    out, wanted = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
    # The third row has no tokens in its list of starts, and three in the batch.
    starts = torch.tensor([0, 3, 6, 6], dtype=torch.int32)
    fa3.sparse_attention(query, cache, page_table, kept, starts, SCALE, out, 3)
    reference.sparse_attention(query, cache, page_table, kept, starts, SCALE, wanted, 3)
    torch.testing.assert_close(out[:6], wanted[:6], rtol=1e-4, atol=1e-5)
    assert not out[:6].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("blocks", [1, BLOCKS])
@pytest.mark.parametrize(("with_sinks", "cap"), [(False, None), (True, None), (True, 1.5)])
def test_dense_attention_is_the_reference_s(layout, heads, blocks, with_sinks, cap):
    torch.manual_seed(0)
    cache = LAYOUTS[layout](heads)[:blocks]
    lens, counts = ([4], [3]) if blocks == 1 else ([7, 3, 12], [2, 3, 1])
    block_table = torch.full((len(lens), 4), 10**6, dtype=torch.int32)
    free = torch.randperm(blocks).tolist()
    for r, n in enumerate(lens):
        for i in range(-(-n // BLOCK)):
            block_table[r, i] = free.pop()
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    query = torch.randn(sum(counts), 2 * heads, SIZE)
    out, wanted = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
    sinks = torch.linspace(-1, 2, 2 * heads) if with_sinks else None
    ours = {"sinks": sinks, "soft_cap": cap}
    fa3.dense_attention(query, cache, block_table, seq_lens, starts, SCALE, out, max(counts), max(lens), **ours)
    reference.dense_attention(query, cache, block_table, seq_lens, starts, SCALE, wanted, **ours)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert not out.isnan().any()

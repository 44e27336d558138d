"""Attention whose logits have a soft cap is softmax over cap * tanh(logit / cap)."""

import pytest
import torch

from specattn_vllm.kernels import launchers, reference
from specattn_vllm.kernels.attention.soft_cap import soft_capped
from specattn_vllm.sketch.layer import attend_densely

HEADS, GROUP, SIZE, CAP, SCALE = 2, 3, 64, 2.5, 0.3
"""Logits have a standard deviation of 2.4, so the cap matters."""


def expected_of(query, key, value, sinks=None, window=None):
    """query [T, Hq, D], key and value [L, H, D], the last T of L: token by token. Returns attention and lse."""
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2])
    for i in range(len(query)):
        end = len(key) - len(query) + i + 1
        first = 0 if window is None else max(0, end - window)
        for head in range(query.shape[1]):
            logits = CAP * torch.tanh(key[first:end, head // GROUP] @ query[i, head] * SCALE / CAP)
            lse[i, head] = logits.logsumexp(0)
            seen = logits if sinks is None else torch.cat((logits, sinks[head : head + 1]))
            out[i, head] = seen.softmax(0)[: len(logits)] @ value[first:end, head // GROUP]
    return out, lse


@pytest.fixture
def drawn(device):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    return draw


class Batch:
    """Ragged requests in a cache whose free places hold NaN."""

    LENGTHS, NEW, BLOCK = [5, 40, 33, 7], [5, 3, 1, 0], 16

    def __init__(self, drawn, device, dtype=torch.float32):
        blocks = sum(-(-length // self.BLOCK) for length in self.LENGTHS)
        self.cache = torch.full((blocks + 1, HEADS, self.BLOCK, 2 * SIZE), torch.nan, device=device, dtype=dtype)
        self.table, first = torch.zeros(4, 3, dtype=torch.int32), 1
        self.kv = []
        for row, length in enumerate(self.LENGTHS):
            count = -(-length // self.BLOCK)
            self.table[row, :count] = torch.arange(first, first + count)
            self.kv.append(drawn(length, HEADS, 2 * SIZE).to(dtype))
            flat = self.cache[first : first + count].transpose(1, 2).flatten(0, 1).clone()
            flat[:length] = self.kv[-1]
            self.cache[first : first + count] = flat.unflatten(0, (count, self.BLOCK)).transpose(1, 2)
            first += count
        self.table = self.table.to(device)
        self.lengths = torch.tensor(self.LENGTHS, dtype=torch.int32, device=device)
        self.starts = torch.tensor([0, *self.NEW], device=device).cumsum(0).int()
        self.query = drawn(sum(self.NEW), HEADS * GROUP, SIZE).to(dtype)

    def rows(self, row):
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    def expected(self, sinks=None):
        for row, kv in enumerate(self.kv):
            kv, rows = kv.float(), self.rows(row)
            yield rows, *expected_of(self.query[rows].float(), kv[..., :SIZE], kv[..., SIZE:], sinks)


def close(found, wanted, dtype=torch.float32):
    torch.testing.assert_close(found.float(), wanted, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_attention(drawn, device, dtype, sinks):
    batch = Batch(drawn, device, dtype)
    sinks, out = drawn(HEADS * GROUP) if sinks else None, torch.zeros_like(batch.query)
    lengths = batch.table, batch.lengths, batch.starts
    reference.dense_attention(batch.query, batch.cache, *lengths, SCALE, out, sinks, CAP)
    for rows, wanted, _ in batch.expected(sinks):
        close(out[rows], wanted, dtype)


@pytest.mark.parametrize("operations", [reference, launchers], ids=["torch", "triton"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per head"])
def test_sparse_attention(drawn, device, operations, shared):
    """Each head reads the entries of even positions, and the new ones."""
    if operations is reference and device.type != "cpu":
        pytest.skip("the same on a CPU")
    batch = Batch(drawn, device)
    groups = 1 if shared else HEADS
    pages = torch.full((4, groups, 40), -7, dtype=torch.int32, device=device)
    kept = torch.zeros(4, groups, dtype=torch.int32, device=device)
    out, lse = torch.zeros_like(batch.query), torch.zeros(batch.query.shape[:2], device=device)
    for row, (length, new) in enumerate(zip(batch.LENGTHS, batch.NEW, strict=True)):
        read = [*range(0, length - new, 2), *range(length - new, length)]
        kept[row] = len(read)
        for group in range(groups):
            for place, p in enumerate(read):
                block = int(batch.table[row, p // batch.BLOCK])
                pages[row, group, place] = (block * HEADS + group) * batch.BLOCK + p % batch.BLOCK
    operations.sparse_attention(batch.query, batch.cache, pages, kept, batch.starts, SCALE, out, 5, lse, CAP)
    for row, (length, new) in enumerate(zip(batch.LENGTHS, batch.NEW, strict=True)):
        kv, rows = batch.kv[row], batch.rows(row)
        kv = torch.cat((kv[: length - new : 2], kv[length - new :]))
        wanted, of = expected_of(batch.query[rows], kv[..., :SIZE], kv[..., SIZE:])
        close(out[rows], wanted)
        close(lse[rows], of)


@pytest.mark.parametrize("operations", [reference, launchers], ids=["torch", "triton"])
@pytest.mark.parametrize("audits", [True, False])
def test_draft_attention(drawn, device, operations, audits):
    """An audit asks for the normaliser of one row alone; a draft step for its scores and its output too."""
    if operations is reference and device.type != "cpu":
        pytest.skip("the same on a CPU")
    batch = Batch(drawn, device)
    scored = (batch.starts[1:] - 1).long()[:, None]
    scored[batch.starts.diff() == 0] = -1
    lse = torch.full((4, HEADS * GROUP), torch.nan, device=device)
    out = None if audits else torch.zeros_like(batch.query)
    scores = None if audits else torch.full((4, HEADS * GROUP, 48), torch.nan, device=device)
    lengths = batch.table, batch.lengths, batch.starts
    operations.draft_attention(
        batch.query, batch.cache, *lengths, SCALE, out, scored, scores, lse, max_query_len=5, soft_cap=CAP
    )
    for row, (rows, wanted, of) in enumerate(batch.expected()):
        if rows.start == rows.stop:
            continue
        close(lse[row], of[-1])
        if not audits:
            close(out[rows], wanted)
            assert scores[row, :, : batch.LENGTHS[row]].abs().max() <= CAP
            close(scores[row, :, : batch.LENGTHS[row]].logsumexp(-1), of[-1])


@pytest.mark.parametrize("window", [None, 5])
def test_attention_without_a_cache(drawn, window):
    query, key, value = (drawn(12, heads, SIZE).cpu() for heads in (HEADS * GROUP, HEADS, HEADS))
    out = torch.empty(12, HEADS * GROUP * SIZE)
    attend_densely(query, key, value, SCALE, out, head_size=SIZE, window=window, soft_cap=CAP)
    close(out.view_as(query), expected_of(query, key, value, window=window)[0])


def test_large_logits_give_the_cap():
    logits = torch.tensor([0.0, 1e-3, -1e30, 1e30, torch.inf])
    torch.testing.assert_close(soft_capped(logits, CAP), torch.tensor([0.0, 1e-3, -CAP, CAP, CAP]))
    assert torch.equal(soft_capped(logits, None), logits)

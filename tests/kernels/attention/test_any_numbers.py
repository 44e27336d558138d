"""Attention of any queries, keys and values: NaN, infinities, denormals, ties, and all numbers the same.

One request of the batch is strange. Of its rows this is checked, by what they see:

- no large logits: the result is the reference's, up to rounding
- logits that are finite, however large: a mean of the values, and a logsumexp next to the largest logit
- NaN in a key, in the query or in a value: NaN, whatever else is there. Damage must not look like an answer
- infinities, and sums beyond float32: anything, because the order of summation decides

All other requests get the same to the last bit as without the strange one. What belongs to nobody is poisoned, is not
read (it would show) and not written. Not drawn, because the contracts exclude them: more keys than the block table has
entries for, page ids outside of the cache, rows of other requests in `scored_rows`.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.attention import draft_attention as module
from specattn_vllm.kernels.attention.draft_attention import draft_attention
from specattn_vllm.kernels.attention.sparse_attention import sparse_attention

LENGTHS = st.sampled_from([0, 1, 2, 15, 16, 17, 33, 64, 70, 130])
KEPT = st.sampled_from([-1, 0, 1, 2, 15, 16, 17, 33, 64, 70, 130])
QUERIES = st.sampled_from([0, 1, 1, 2, 4])
SHAPES = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([1, 2]),
        "ratio": st.sampled_from([1, 3]),
        "size": st.sampled_from([64, 96]),
        "layout": st.sampled_from(["LBNHC", "LBHNC"]),
        "soft_cap": st.sampled_from([None, 5.0]),
    }
)
TAME, MOST = 30.0, 1e37
"""Sums of |query| |key| up to which results are compared, and up to which nothing can overflow."""


@st.composite
def rows(draw, lengths):
    """Lengths, query lengths, and which request is strange."""
    lens = draw(st.lists(lengths, min_size=1, max_size=3))
    return lens, [draw(QUERIES) for _ in lens], draw(st.integers(0, len(lens) - 1))


def check_row(query, keys, values, scale, soft_cap, later, got, want):
    """One query row [D] that sees keys, values [n, D]; `later`: more values of the request, which it does not see. got
    and want: (out, lse); out may be None."""
    (out, lse), (out_wanted, lse_wanted) = got, want
    if not len(keys):
        assert lse == -torch.inf and (out is None or (out[later.isfinite().all(0)] == 0).all())
        return
    if query.isnan().any() or keys.isnan().any():
        assert lse.isnan() and (out is None or out.isnan().all()), "a NaN does not show"
        return
    size = (query.double().abs() * keys.double().abs()).sum(-1)
    if not (size < MOST).all():
        return
    exact = (query.double() * keys.double()).sum(-1) * scale
    exact = exact if soft_cap is None else soft_cap * (exact / soft_cap).tanh()
    error = 1e-5 * (1 + float(size.max()) * scale)
    assert exact.max() - error <= lse <= exact.logsumexp(-1) + error
    tame = float(size.max()) * scale <= TAME
    if tame:
        torch.testing.assert_close(lse, lse_wanted, rtol=1e-5, atol=5e-5)
    if out is None:
        return
    assert out[values.isnan().any(0)].isnan().all(), "a NaN does not show"
    # A weight of 0 makes NaN of what is not finite: rows of the same request that come later may show it.
    fine = torch.cat((values, later)).isfinite().all(0) & (values.double().abs().sum(0) < MOST)
    out, out_wanted, values = out[fine].double(), out_wanted[fine].double(), values[:, fine].double()
    if not fine.any():
        return
    room = 1e-5 * values.abs().amax(0) + 1e-38
    assert (out >= values.amin(0) - room).all() and (out <= values.amax(0) + room).all(), "no mean of the values"
    if tame:
        assert ((out - out_wanted).abs() <= 20 * room).all()


@settings(max_examples=60)
@given(
    data=st.data(), shape=SHAPES, batch=rows(LENGTHS), per_request=st.sampled_from([1, 2]), with_out=st.booleans(),
    rows_of_a_tile=st.sampled_from([16, 128]),
)  # fmt: skip
def test_draft_attention(
    device, drafting, any_numbers, data, shape, batch, per_request, with_out, rows_of_a_tile
):  # fmt: skip
    lens, q_lens, strange = batch
    heads, ratio, size, soft_cap = (shape[name] for name in ("heads", "ratio", "size", "soft_cap"))
    params = (lens, q_lens, heads, ratio, size, 16, shape["layout"])
    plain, changed = (drafting.build(params, device, torch.float32, per_request) for _ in range(2))
    length, n = lens[strange], q_lens[strange]
    begin = int(changed.starts[strange])
    content = any_numbers(data, (heads, length, 2 * size))
    for i, block in enumerate(changed.data.block_table[strange, : -(-length // 16)].tolist()):
        part = content[:, i * 16 : (i + 1) * 16]
        changed.data.kv_cache[block, :, : part.shape[1]] = part.to(device)
    changed.query[begin : begin + n] = any_numbers(data, (n, heads * ratio, size)).to(device)
    more = {"soft_cap": soft_cap, "with_out": with_out}
    usual, module.FP32_MAX_BLOCK_M = module.FP32_MAX_BLOCK_M, rows_of_a_tile
    try:
        alone, got = (drafting.run(draft_attention, b, max(lens) + 9, **more) for b in (plain, changed))
    finally:
        module.FP32_MAX_BLOCK_M = usual
    want = drafting.run(reference.draft_attention, changed, max(lens) + 9, **more)

    own = torch.zeros(len(changed.query), dtype=torch.bool)
    own[begin : begin + n] = True
    if with_out:
        assert torch.equal(got[0][~own].nan_to_num(7e7), alone[0][~own].nan_to_num(7e7)), "others changed"
    others = [r for r in range(len(lens)) if r != strange]
    for one, other in zip(got[1:], alone[1:], strict=True):
        assert torch.equal(one[others].nan_to_num(7e7), other[others].nan_to_num(7e7)), "others changed"

    query, content = changed.query[begin : begin + n].cpu(), content.cpu()
    by_row = (heads, per_request, ratio)
    lse_of, lse_wanted = (x[2][strange].cpu().view(by_row) for x in (got, want))
    written = got[1][strange].cpu().view(*by_row, -1)
    scored = changed.scored[strange].tolist()
    for i in range(n):
        seen = max(length - (n - 1 - i), 0)
        of = [c for c, row in enumerate(scored) if row == begin + i]
        for h in range(heads * ratio):
            mine = content[h // ratio]
            k, v, later = mine[:seen, :size], mine[:seen, size:], mine[seen:, size:]
            outs = [x[0][begin + i, h].cpu() if with_out else None for x in (got, want)]
            for c in of:
                at = h // ratio, c, h % ratio
                check_row(
                    query[i, h], k, v, size**-0.5, soft_cap, later, (outs[0], lse_of[at]), (outs[1], lse_wanted[at])
                )
                assert written[at][seen:].isnan().all(), "scores past what the row sees"
                bad = query[i, h].isnan().any() | k.isnan().any(-1)
                assert torch.equal(written[at][:seen].isnan() & bad, bad), "a NaN does not show in the scores"


@st.composite
def tables(draw, groups):
    kept = draw(st.lists(st.lists(KEPT, min_size=groups, max_size=groups), min_size=1, max_size=3))
    return kept, [draw(QUERIES) for _ in kept], draw(st.integers(0, len(kept) - 1))


@settings(max_examples=60)
@given(data=st.data(), shape=SHAPES, shared=st.booleans())
def test_sparse_attention(device, paged, poisoned, any_numbers, data, shape, shared):
    heads, ratio, size, soft_cap = (shape[name] for name in ("heads", "ratio", "size", "soft_cap"))
    kept, q_lens, strange = data.draw(tables(1 if shared else heads))
    # Every request has a part of the cache; which of its tokens it reads is drawn by a seed.
    lens = [max(1, *counts) + 3 for counts in kept]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    caches = [paged(lens, heads, size, 16, shape["layout"], device, torch.float32) for _ in range(2)]
    content = any_numbers(data, (heads, lens[strange], 2 * size))
    for i, block in enumerate(caches[1].block_table[strange, : -(-lens[strange] // 16)].tolist()):
        part = content[:, i * 16 : (i + 1) * 16]
        caches[1].kv_cache[block, :, : part.shape[1]] = part.to(device)
    table = torch.full((len(kept), len(kept[0]), max(lens)), 2_000_000_000, dtype=torch.int32)
    read = {}
    block, per_head, token = caches[0].page_strides
    for r, counts in enumerate(kept):
        for g, number in enumerate(counts):
            p = read[r, g] = torch.randperm(lens[r], generator=generator)[: max(number, 0)].sort().values
            blocks = caches[0].block_table[r].cpu()[p // 16]
            table[r, g, : len(p)] = (blocks * block + g * per_head + p % 16 * token).int()
    starts = torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0).int()
    begin, n = int(starts[strange]), q_lens[strange]
    queries = [torch.randn(sum(q_lens) + 2, heads * ratio, size, generator=generator)] * 2
    queries = [q.clone().to(device) for q in queries]
    queries[1][begin : begin + n] = any_numbers(data, (n, heads * ratio, size)).to(device)
    rest = table.to(device), torch.tensor(kept, dtype=torch.int32, device=device), starts.to(device), size**-0.5
    results = []
    for op, which in ((sparse_attention, 0), (sparse_attention, 1), (reference.sparse_attention, 1)):
        out = poisoned(queries[0].shape, torch.float32, device)
        lse = poisoned(queries[0].shape[:2], torch.float32, device)
        op(queries[which], caches[which].kv_cache, *rest, out, max(1, *q_lens), lse, soft_cap)
        results.append((out.cpu(), lse.cpu()))
    alone, got, want = results
    own = torch.zeros(len(queries[0]), dtype=torch.bool)
    own[begin : begin + n] = True
    for one, other in zip(got, alone, strict=True):
        assert torch.equal(one[~own].nan_to_num(7e7), other[~own].nan_to_num(7e7)), "others changed"
    for i in range(n):
        for h in range(heads * ratio):
            g = 0 if shared else h // ratio
            if kept[strange][g] <= 0:
                assert got[0][begin + i, h].isnan().all() and got[1][begin + i, h].isnan()
                continue
            entries = content[h // ratio, read[strange, g]]
            seen = max(len(entries) - (n - 1 - i), 0)
            k, v, later = entries[:seen, :size], entries[:seen, size:], entries[seen:, size:]
            pairs = [(x[0][begin + i, h], x[1][begin + i, h]) for x in (got, want)]
            check_row(queries[1][begin + i, h].cpu(), k, v, size**-0.5, soft_cap, later, *pairs)

"""draft_attention over lists of positions: kernel against reference, reference against torch's own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.attention import draft_attention as module
from specattn_vllm.kernels.attention.draft_attention import draft_attention

OPS = pytest.mark.parametrize("op", [draft_attention, reference.draft_attention], ids=["kernel", "reference"])


def listed(why, lens, q_lens, prefixes, kept, block_size=16, ratio=2):
    """kept: entries of each list, "all" of the prefix, -1 for a row that reads everything, or (entries, n): these, and
    each of the last n positions of the prefix."""
    return pytest.param((lens, q_lens, prefixes, kept, block_size, ratio), id=why)


LISTED = [
    listed("lists around a step", [60, 61, 62], [1, 1, 1], [50, 50, 50], [31, 32, 33], ratio=1),
    listed("row without a list between rows with one", [70, 70, 20], [1, 1, 1], [60, 13, 18], [9, -1, 3]),
    listed("nothing listed, all listed", [40, 40], [1, 1], [37, 37], [0, "all"]),
    listed("one token behind the list", [40, 50], [1, 1], [39, 30], [5, 7], ratio=1),
    listed("padded rows", [0, 33, 0], [1, 1, 0], [0, 20, 9], [-1, 4, 6]),
    listed("many splits", [700], [1], [650], [400], ratio=4),
    listed("big pages", [300, 200], [1, 1], [299, 100], [90, 20], block_size=128),
    listed("page size that is no power of two", [90, 50], [1, 1], [80, 49], [41, 10], block_size=24),
    listed(
        "one split", [20, 40, 33, 5, 64, 30, 2, 8], 8 * [1], [18, 30, 21, 4, 63, 29, 1, 7], [9, 3, -1, 2, 30, 5, 1, 0],
        ratio=1,
    ),
]  # fmt: skip

# Several query tokens share a list; the first and the last are scored.
SHARED = [
    listed(
        "tokens from 1 to 7", [61, 62, 63, 64, 65, 66, 67], [1, 2, 3, 4, 5, 6, 7], [60, 58, 57, 50, 60, 60, 60],
        [31, 30, 29, 28, 27, -1, 32],
    ),
    listed("the new tokens alone behind the list", [40, 50, 30], [7, 3, 2], [33, 47, 28], [5, "all", 0], ratio=4),
    listed("new tokens across a step", [80, 90], [5, 7], [60, 70], [10, 28], ratio=1),
    listed("tokens beside empty and padded rows", [40, 30, 0, 70], [6, 0, 3, 2], [20, 20, 9, 60], [7, 5, 6, -1]),
    listed("nothing but the new tokens", [9, 7], [7, 7], [2, 0], [0, 0]),
    listed("several tokens, many splits", [700, 20], [5, 2], [650, 11], [400, 3], ratio=4),
    listed("several tokens, page size that is no power of two", [90, 50], [3, 4], [80, 40], [41, 10], block_size=24),
    listed("own tokens that are listed", [61, 62, 40], [7, 5, 3], [60, 62, 38], [(31, 6), (0, 9), (4, 2)]),
    listed("more rows than a tile", [50, 90], [7, 5], [40, 60], [20, 40], ratio=6),
]  # fmt: skip


def build_listed(drafting, params, device, dtype):
    lens, q_lens, prefixes, kept, block_size, ratio = params
    heads = 8 if len(lens) == 8 else 2
    per_request = 1 if max(q_lens) == 1 else 2
    batch = drafting.build((lens, q_lens, heads, ratio, 64, block_size, "LBNHC"), device, dtype, per_request)
    gen = torch.Generator().manual_seed(5)
    width = max(lens) + 3
    positions = torch.full((len(lens), width), 1 << 30, dtype=torch.int32)
    pairs = [
        (0, p) if k == "all" else k if isinstance(k, tuple) else (k, 0) for k, p in zip(kept, prefixes, strict=True)
    ]
    counts = [entries + last for entries, last in pairs]
    lists = []
    for r, (length, prefix, count, (entries, last)) in enumerate(zip(lens, prefixes, counts, pairs, strict=True)):
        if count < 0:
            lists.append(list(range(length)))
            continue
        chosen = torch.randperm(prefix - last, generator=gen)[:entries].sort().values
        chosen = torch.cat((chosen, torch.arange(prefix - last, prefix)))
        positions[r, :count] = chosen.int()
        lists.append(chosen.tolist() + list(range(prefix, length)) if length else [])
    ints = [torch.tensor(x, dtype=torch.int32, device=device) for x in (counts, prefixes)]
    return batch, dict(zip(("positions", "kept", "prefix_lens"), (positions.to(device), *ints), strict=True)), lists


@pytest.mark.parametrize("with_out", [True, False], ids=["out", "scores only"])
@pytest.mark.parametrize("params", LISTED + SHARED)
def test_listed_kernel_matches_reference(params, with_out, place, drafting):
    device, dtype = place
    batch, index, _ = build_listed(drafting, params, device, dtype)
    width = max(params[0]) + 2
    got = drafting.run(draft_attention, batch, width, with_out=with_out, **index)
    want = drafting.run(reference.draft_attention, batch, width, with_out=with_out, **index)
    drafting.check(batch, got, want, dtype)


@pytest.mark.parametrize("params", SHARED)
def test_listed_kernel_with_large_tiles_matches_reference(params, place, drafting, monkeypatch):
    monkeypatch.setattr(module, "FP32_MAX_BLOCK_M", 128)
    test_listed_kernel_matches_reference(params, True, place, drafting)


@OPS
@pytest.mark.parametrize("params", SHARED)
def test_listed_output_alone(op, params, place, drafting, poisoned, close):
    """No scores: what a draft step does that reads a list and is not captured."""
    device, dtype = place
    batch, index, _ = build_listed(drafting, params, device, dtype)
    want = drafting.run(reference.draft_attention, batch, max(params[0]), **index)[0]
    out = poisoned(batch.query.shape, dtype, device)
    op(*batch.args(out), max_query_len=batch.longest_query, **index)
    used = int(batch.starts[-1])
    close("out", out[:used], want[:used], dtype)
    assert out[used:].isnan().all()


@pytest.mark.parametrize("params", LISTED + SHARED)
def test_listed_reference_matches_torch(params, drafting, close):
    batch, index, lists = build_listed(drafting, params, torch.device("cpu"), torch.float32)
    out, scores, lse = drafting.run(reference.draft_attention, batch, max(params[0]) + 1, **index)
    q_lens, ratio = params[1], params[-1]
    scores, lse = (x.unflatten(1, (-1, batch.scored.shape[1], ratio)) for x in (scores, lse))
    for r, entries in enumerate(lists):
        begin = int(batch.starts[r])
        for t in range(q_lens[r]):
            seen = entries[: max(len(entries) - (q_lens[r] - 1 - t), 0)]
            k, v = (x[r][:, seen].repeat_interleave(ratio, 0) for x in (batch.data.keys, batch.data.values))
            q = batch.query[begin + t][:, None]
            logits = (q @ k.transpose(1, 2))[:, 0] / 8
            if seen:
                close("out", out[begin + t], F.scaled_dot_product_attention(q, k, v)[:, 0], torch.float32)
            else:
                assert (out[begin + t] == 0).all()
            for c in (c for c, row in enumerate(batch.scored[r].tolist()) if row == begin + t):
                close("scores", scores[r, :, c, :, : len(seen)].flatten(0, 1), logits, torch.float32)
                assert scores[r, :, c, :, len(seen) :].isnan().all()
                close("lse", lse[r, :, c].flatten(), logits.logsumexp(-1))
        for c in (c for c, row in enumerate(batch.scored[r].tolist()) if row < 0):
            assert scores[r, :, c].isnan().all() and lse[r, :, c].isnan().all()

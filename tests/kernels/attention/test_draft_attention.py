"""draft_attention: kernel against reference, reference against torch's own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specattn_vllm.kernels import reference
from specattn_vllm.kernels.attention import draft_attention as module
from specattn_vllm.kernels.attention.draft_attention import LaunchConfig, draft_attention
from specattn_vllm.kernels.contracts import HEAD_SIZES
from specattn_vllm.kernels.padding import padded
from specattn_vllm.kernels.selection.mass import accumulate_mass

SCORED_ROWS = pytest.mark.parametrize("per_request", [1, 2], ids=["one scored row", "two scored rows"])
OPS = pytest.mark.parametrize("op", [draft_attention, reference.draft_attention], ids=["kernel", "reference"])


def case(why, lens, q_lens, heads, ratio, size=64, block_size=16, layout="LBHNC"):
    return pytest.param((lens, q_lens, heads, ratio, size, block_size, layout), id=why)


CASES = [
    case("one key", [1], [1], 1, 1),
    case("around a page edge", [15, 16, 17], [1, 1, 1], 2, 2, layout="LBNHC"),
    case("around a step of keys", [31, 32, 33, 63, 64, 65], 6 * [1], 1, 4, layout="LBNHC"),
    case("several tokens around a step of keys", [31, 32, 33, 34, 64, 65], 6 * [3], 1, 2),
    case("around 128 with a big page", [127, 128, 129], [1, 2, 1], 1, 8, block_size=128, layout="LBNHC"),
    case("a page of one step", [70, 64], [2, 1], 1, 2, block_size=32),
    case("ragged queries", [40, 3, 100, 257], [7, 2, 0, 1], 2, 2),
    case("more tokens than keys", [2, 5], [4, 7], 1, 2, layout="LBNHC"),
    case("padded rows between requests", [40, 0, 70, 0], [1, 1, 2, 0], 2, 2),
    case("only padded rows", [0, 0], [0, 1], 2, 4),
    case("many splits", [1000], [2], 1, 4),
    case("rows for several programs to combine", [300], [7], 2, 4),
    case("splits without keys beside a long row", [70, 900], [1, 3], 1, 2, size=128),
    case("more rows than a tile", [50, 9], [7, 7], 1, 6),
    case("a group that is no power of two", [50], [3], 1, 24),
    case("page size that is no power of two", [50, 49], [1, 2], 3, 1, block_size=24, layout="LBNHC"),
    case("head size 96", [20, 300], [1, 5], 2, 3, size=96),
    case("head size 192, splits", [500, 3], [2, 1], 1, 2, size=192, layout="LBNHC"),
    case("head size 256", [20, 300], [1, 5], 2, 3, size=256),
    case("one split", [20, 40, 33, 5, 64, 30, 2, 8], [1, 7, 2, 1, 1, 0, 3, 1], 8, 1, size=128),
]


@SCORED_ROWS
@pytest.mark.parametrize("params", CASES)
def test_kernel_matches_reference(params, per_request, place, drafting):
    device, dtype = place
    batch = drafting.build(params, device, dtype, per_request)
    width = max(params[0]) + 9
    got = drafting.run(draft_attention, batch, width)
    want = drafting.run(reference.draft_attention, batch, width)
    drafting.check(batch, got, want, dtype)


@SCORED_ROWS
@pytest.mark.parametrize("params", CASES)
def test_kernel_with_large_tiles_matches_reference(params, per_request, place, drafting, monkeypatch):
    """Tiles of more than 16 rows make the scores by a product of their own; fp32 has none unless it is made to."""
    monkeypatch.setattr(module, "FP32_MAX_BLOCK_M", 128)
    test_kernel_matches_reference(params, per_request, place, drafting)


@SCORED_ROWS
@pytest.mark.parametrize("params", CASES)
def test_reference_matches_torch(params, per_request, drafting, close):
    """The reference against torch on the unpaged tensors: nothing of ours but the page table's construction."""
    lens, q_lens, heads, ratio, size = params[:5]
    batch = drafting.build(params, torch.device("cpu"), torch.float32, per_request)
    out, scores, lse = drafting.run(reference.draft_attention, batch, max(lens) + 1)
    for r, (length, n) in enumerate(zip(lens, q_lens, strict=True)):
        begin = int(batch.starts[r])
        seen = [max(length - (n - 1 - t), 0) for t in range(n)]
        q = batch.query[begin : begin + n].transpose(0, 1)
        for t in range(n):
            k, v = (x[r][:, : seen[t]].repeat_interleave(ratio, 0) for x in (batch.data.keys, batch.data.values))
            if seen[t] == 0:
                assert (out[begin + t] == 0).all()
                continue
            want = F.scaled_dot_product_attention(q[:, t : t + 1], k, v)
            close("out", out[begin + t], want[:, 0], torch.float32)
        for c, row in enumerate(batch.scored[r].tolist()):
            # What belongs to a KV head is together, the query heads of one token after those of the other.
            where = torch.tensor([(k * per_request + c) * ratio + i for k in range(heads) for i in range(ratio)])
            if row < 0:
                assert lse[r, where].isnan().all() and scores[r, where].isnan().all()
                continue
            i = row - begin
            k = batch.data.keys[r][:, : seen[i]].repeat_interleave(ratio, 0)
            logits = (q[:, i : i + 1] @ k.transpose(1, 2))[:, 0] * size**-0.5
            close("scores", scores[r, where, : seen[i]], logits, torch.float32)
            assert scores[r, where, seen[i] :].isnan().all()
            close("lse", lse[r, where], logits.logsumexp(-1))


@SCORED_ROWS
@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16], ids=["fp32 scores", "bf16 scores"])
@pytest.mark.parametrize("lens, q_lens", [([65, 0, 33, 9], [1, 1, 1, 1]), ([300, 40, 5, 20], [3, 6, 7, 2])])
def test_scores_without_output(lens, q_lens, score_dtype, per_request, place, drafting):
    """out=None takes another path: the scored rows alone, and no values are loaded."""
    device, dtype = place
    batch = drafting.build((lens, q_lens, 2, 2, 64, 16, "LBNHC"), device, dtype, per_request)
    full = drafting.run(reference.draft_attention, batch, 310)[1:]
    batch.data.kv_cache[..., 64:] = torch.nan  # reading a value would show
    kind = ("bf16 scores", None) if score_dtype is torch.bfloat16 else ("scores", dtype)
    for op in (draft_attention, reference.draft_attention):
        _, scores, lse = drafting.run(op, batch, 310, score_dtype, with_out=False)
        drafting.check(batch, (None, scores, lse), (None, *full), dtype, kind)


@OPS
def test_output_alone(op, place, drafting, poisoned, close):
    """Neither scores nor lse, and strided outputs are honoured; one (R, H) grid has one split, the other several."""
    device, dtype = place
    for heads, lens, q_lens in ((2, [130, 20], [2, 1]), (4, [20, 30, 9], [1, 5, 2])):
        batch = drafting.build((lens, q_lens, heads, 2, 64, 16, "LBHNC"), device, dtype)
        wide = poisoned((batch.query.shape[0], 2 * heads + 3, 64), dtype, device)
        want = drafting.run(reference.draft_attention, batch, 140)[0]
        op(*batch.args(wide[:, 1 : 2 * heads + 1]), max_query_len=batch.longest_query)
        used = int(batch.starts[-1])
        close("out", wide[:used, 1 : 2 * heads + 1], want[:used], dtype)
        assert wide[:, 0].isnan().all() and wide[:, 2 * heads + 1 :].isnan().all() and wide[used:].isnan().all()


def test_lse_alone(place, drafting, poisoned, close):
    device, dtype = place
    batch = drafting.build(([100, 20], [2, 1], 1, 2, 64, 16, "LBHNC"), device, dtype)
    want = drafting.run(reference.draft_attention, batch, 100)
    for op in (draft_attention, reference.draft_attention):
        out, lse = poisoned(batch.query.shape, dtype, device), poisoned((2, 2), torch.float32, device)
        op(*batch.args(out), batch.scored, None, lse, 2)
        close("out", out[:3], want[0][:3], dtype)
        close("lse", lse, want[2])


@SCORED_ROWS
@pytest.mark.parametrize("lens, q_lens", [([65, 0, 33, 9], [1, 1, 1, 1]), ([900, 40, 5, 20], [3, 0, 7, 2])])
def test_nothing_but_lse(lens, q_lens, per_request, place, drafting, poisoned, close):
    """What an audit asks for, of some rows: no value is read, and nothing is written for the others."""
    device, dtype = place
    batch = drafting.build((lens, q_lens, 2, 2, 64, 16, "LBNHC"), device, dtype, per_request)
    batch.scored[2] = -1
    want = drafting.run(reference.draft_attention, batch, 910)[2]
    assert want[2].isnan().all() and not want[0].isnan().all()
    batch.data.kv_cache[..., 64:] = torch.nan
    for op in (draft_attention, reference.draft_attention):
        lse = poisoned((len(lens), 4 * per_request), torch.float32, device)
        op(*batch.args(None), batch.scored, None, lse)
        missing = want.isnan()
        assert torch.equal(lse.isnan(), missing)
        close("lse", lse[~missing], want[~missing])


@OPS
@pytest.mark.parametrize("wants", ["out", "scores", "lse"])
@pytest.mark.parametrize("requests", [[3, -1, 0], [0, 4, 3], [-1], []], ids=str)
def test_of_some_requests(requests, wants, op, place, drafting, poisoned):
    """Listed in any order, with gaps: each as in a full batch. Nothing of the others is read or written."""
    device, dtype = place
    params = ([65, 33, 9, 700, 2], [1, 2, 1, 3, 4], 2, 2, 64, 16, "LBNHC")
    batch = drafting.build(params, device, dtype, 1 if wants == "lse" else 2)
    batch.scored[3, 0] = batch.starts[3]
    want = list(drafting.run(reference.draft_attention, batch, 710, with_out=wants == "out"))
    for r in {*range(5)} - {*requests}:
        tokens = slice(int(batch.starts[r]), int(batch.starts[r + 1]))
        batch.query[tokens], batch.data.seq_lens[r], batch.data.block_table[r] = torch.nan, 720, 2_000_000_000
        want[1][r], want[2][r] = torch.nan, torch.nan
        if wants == "out":
            want[0][tokens] = torch.nan
    listed = torch.tensor(requests, dtype=torch.int64, device=device)
    if wants == "lse":
        lse = poisoned(want[2].shape, torch.float32, device)
        op(*batch.args(None), batch.scored, None, lse, batch.longest_query, requests=listed)
        assert torch.equal(lse.isnan(), want[2].isnan())
        drafting.close("lse", lse[~lse.isnan()], want[2][~lse.isnan()])
        return
    got = drafting.run(op, batch, 710, with_out=wants == "out", requests=listed)
    for name, mine, wanted in zip(("out", ("scores", dtype), "lse"), got, want, strict=True):
        if mine is not None:
            written = wanted.isfinite()
            assert torch.equal(mine.isfinite(), written)
            kind = name if isinstance(name, tuple) else (name, dtype if name == "out" else None)
            drafting.close(kind[0], mine[written], wanted[written], kind[1])


def test_parts_follow_the_requests_that_are_worked_on(drafting, device, monkeypatch):
    """One request of many is cut into as many parts as it would be by itself."""
    batch = drafting.build(([700, *15 * [20]], 16 * [1], 2, 2, 64, 16, "LBNHC"), device, torch.float32)
    splits, choose = [], module.num_splits
    monkeypatch.setattr(module, "num_splits", lambda *a: splits.append(choose(*a)) or splits[-1])
    drafting.run(draft_attention, batch, 700, with_out=False)
    drafting.run(draft_attention, batch, 700, with_out=False, requests=torch.tensor([0], device=device))
    alone = drafting.build(([700], [1], 2, 2, 64, 16, "LBNHC"), device, torch.float32)
    drafting.run(draft_attention, alone, 700, with_out=False)
    assert splits[0] < splits[1] == splits[2]


@OPS
@pytest.mark.parametrize("with_out", [True, False], ids=["out", "scores only"])
def test_scored_row_of_another_request(with_out, op, place, drafting):
    """A row of no request of that number stores nothing; padded rows may hold one."""
    device, dtype = place
    batch = drafting.build(([30, 40, 20], [2, 0, 1], 1, 2, 64, 16, "LBHNC"), device, dtype)
    batch.scored = torch.tensor([[2, -1], [0, 1], [5, 0]], device=device)
    _, scores, lse = drafting.run(op, batch, 50, with_out=with_out)
    assert scores.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("by", ["kernel", "reference"])
def test_mass_of_two_rows_by_kv_head(by, device, drafting, poisoned, close):
    """The mean over both rows and the KV head's query heads: `accumulate_mass` takes the rows for further heads."""
    attend = draft_attention if by == "kernel" else reference.draft_attention
    accumulate = accumulate_mass if by == "kernel" else reference.accumulate_mass
    lens, before = [70, 40], torch.tensor([67, 39], dtype=torch.int32, device=device)
    batch = drafting.build((lens, [3, 1], 2, 4, 64, 16, "LBNHC"), device, torch.float32, per_request=2)
    batch.scored = torch.tensor([[0, 2], [3, 3]], device=device)
    _, scores, lse = drafting.run(attend, batch, 72)
    mass = poisoned((2, 2, 72), torch.float32, device)
    accumulate(scores, lse, before, mass, 1 / 8, "store")
    for r, seen in enumerate(((68, 70), (40, 40))):
        context, wanted = int(before[r]), 0
        for row, keys in zip(batch.scored[r].tolist(), seen, strict=True):
            logits = batch.query[row].view(2, 4, 64) @ batch.data.keys[r][:, :keys].mT / 8
            wanted = wanted + logits.softmax(-1)[..., :context].sum(1) / 8
        close("out", mass[r, :, :context], wanted, torch.float32)
        assert mass[r, :, context:].isnan().all()


def test_kernel_large_logits(place, drafting, close):
    """Logits of several hundred overflow exp unless the running maximum is subtracted, in every split."""
    device, dtype = place
    batch = drafting.build(([300], [1], 1, 2, 64, 16, "LBNHC"), device, dtype)
    got = drafting.run(draft_attention, batch, 300, scale=10.0)
    want = drafting.run(reference.draft_attention, batch, 300, scale=10.0)
    close("out", got[0][:1], want[0][:1], dtype)
    close("lse", got[2], want[2])
    assert got[2].min() > 89  # exp of that is infinite in fp32


@pytest.mark.parametrize("config", [LaunchConfig(16, 4, 2, 1), LaunchConfig(64, 4, 3, 8), LaunchConfig(128, 8, 2, 64)])
def test_launch_config_changes_no_result(config, place, drafting):
    device, dtype = place
    batch = drafting.build(([260, 31], [2, 1], 1, 2, 64, 16, "LBHNC"), device, dtype)
    got = drafting.run(draft_attention, batch, 261, config=config)
    drafting.check(batch, got, drafting.run(reference.draft_attention, batch, 261), dtype)


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_every_tile_has_a_configuration(size):
    block_m = 16
    while block_m <= module.MAX_BLOCK_M[padded(size)]:
        assert module.launch_config(size, block_m).num_stages >= 2
        block_m *= 2

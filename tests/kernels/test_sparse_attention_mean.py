"""sparse_attention that counts what it does not read as its mean: kernel against reference, reference against softmax
over what was read and as many copies of the mean as were not."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.executors import with_mean
from specattn_vllm.kernels import reference
from specattn_vllm.kernels.sparse_attention import LaunchConfig, sparse_attention
from specattn_vllm.kernels.unread_contracts import LONGEST, Mean

BLOCK, STALE, SLOTS = 16, 2_000_000_000, 11
# Of each row: query tokens, context with them, tokens read, its slot, tokens summed before; and tokens in the cache for
# good, if not those of the context that are no query tokens.
PRUNED = (3, 140, 60, 4, 130)
ROWS = {
    "pruned, and its sums up to date": (3, 140, 60, 5, 137),
    "pruned, and tokens to sum": PRUNED,
    "another": (2, 75, 20, 7, 73),
    "all of it read": (3, 50, 50, 0, 40),
    "padding": (0, 0, 0, -1, 0),
    "nobody's, though it reads": (2, 44, 12, -1, 0),
    "no query": (0, 30, 12, 6, 20),
    "left to another executor": (2, 40, 0, 1, 30),
    "all of it to sum": (1, 40, 8, 2, 0),
    "nothing to sum": (2, 30, 12, 8, 0, 0),
    "summed further than it should be": (2, 60, 25, 9, 60),
    "more to sum than a step may": (1, LONGEST + 90, 33, 3, 5),
}
CONFIGS = {
    "as it is": None,
    "one part": LaunchConfig(block_m=16, block_n=16, num_warps=2, num_stages=1, waves=0),
    "many parts": LaunchConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, waves=64),
}


class Step:
    """The rows' cache, tables and means; NaN and stale ids wherever nothing may be read."""

    def __init__(self, rows, groups, heads, group, size, place, poisoned) -> None:
        device, dtype = place
        gen = torch.Generator().manual_seed(5)
        self.lens = [row[5] if len(row) > 5 else row[1] - row[0] for row in rows]
        self.rows, self.heads, self.group, self.size = [row[:5] for row in rows], heads, group, size
        rows = self.rows
        blocks = [-(-length // BLOCK) for _, length, *_ in rows]
        order = torch.randperm(sum(blocks), generator=gen).tolist()
        # Token-major, as vLLM prefers.
        self.cache = poisoned((sum(blocks) + 1, BLOCK, heads, 2 * size), dtype, device).transpose(1, 2)
        table = torch.full((len(rows), max(blocks) + 1), STALE, dtype=torch.int32)
        pages = torch.full((len(rows), groups, 200), STALE, dtype=torch.int32)
        kept = torch.zeros(len(rows), groups, dtype=torch.int32)
        sums = poisoned((SLOTS, heads, 2 * size), torch.float32, device)
        summed = torch.full((SLOTS, heads), 77, dtype=torch.int32)
        self.kv, self.read = [], {}
        for r, (queries, length, count, slot, done) in enumerate(rows):
            kv = torch.randn(heads, length, 2 * size, generator=gen).to(dtype).to(device)
            for b in range(blocks[r]):
                table[r, b] = block = order.pop()
                part = kv[:, b * BLOCK : (b + 1) * BLOCK]
                self.cache[block, :, : part.shape[1]] = part
            for g in range(groups):
                # One more in each group, unless it is all; the new tokens are always read.
                number = count + g if 0 < count < length else count
                old = torch.randperm(length - queries, generator=gen)[: number - queries]
                read = torch.cat((old, torch.arange(length - queries, length)))[:number].sort().values
                self.read[r, g] = read.to(device)
                kept[r, g] = number
                row_pages = (table[r, read // BLOCK] * BLOCK + read % BLOCK) * heads
                pages[r, g, :number] = row_pages + (g if groups > 1 else 0)
            if slot >= 0:
                summed[slot] = done
                if done:
                    sums[slot] = kv[:, :done].float().sum(1)
            self.kv.append(kv)
        starts = torch.tensor([0, *(row[0] for row in rows)]).cumsum(0).int()
        self.starts = starts.tolist()
        tokens = self.starts[-1] + 2
        self.query = torch.randn(tokens, heads * group, size, generator=gen).to(dtype).to(device)
        self.given = (pages.to(device), kept.to(device), starts.to(device), size**-0.5)
        lens = torch.tensor(self.lens, dtype=torch.int32)
        seq_lens = torch.tensor([row[1] for row in rows], dtype=torch.int32)
        slots = torch.tensor([row[3] for row in rows])
        rest = (lens.to(device), seq_lens.to(device), slots.to(device), sums, summed.to(device))
        self.mean = Mean(table.to(device), *rest)
        self.poisoned, self.longest = poisoned, max(row[0] for row in rows)

    def run(self, op, lse: bool = False, **more):
        """(out, lse or None, sums, summed) of an operation on copies of what it changes."""
        device, dtype = self.query.device, self.query.dtype
        out = self.poisoned(self.query.shape, dtype, device)
        total = self.poisoned(self.query.shape[:2], torch.float32, device) if lse else None
        mean = self.mean._replace(sums=self.mean.sums.clone(), summed=self.mean.summed.clone())
        op(self.query, self.cache, *self.given, out, self.longest, total, mean, **more)
        return out, total, mean.sums, mean.summed


SHAPES = {
    "shared": (1, 2, 4, 64),
    "per head": (2, 2, 3, 64),
    "one head": (1, 1, 8, 128),
    "more rows than a tile": (1, 1, 30, 64),
}
EACH_SHAPE = pytest.mark.parametrize(("groups", "heads", "group", "size"), SHAPES.values(), ids=SHAPES)
# Each configuration with each shape, and either with and without the logsumexp.
CASES = [
    pytest.param(config, name, bool((c + s) % 2), id=f"{why}-{name}")
    for c, (why, config) in enumerate(CONFIGS.items())
    for s, name in enumerate(SHAPES)
]


@pytest.mark.parametrize(("config", "name", "lse"), CASES)
def test_kernel_matches_reference(config, name, lse, place, poisoned, close):
    device, dtype = place
    groups, heads, group, size = SHAPES[name]
    if dtype == torch.float32 and device.type == "cuda" and config is not None and size == 128:
        pytest.skip("fp32 steps of this size do not fit in shared memory")
    rows = list(ROWS.values())
    if name == "more rows than a tile" and device.type == "cpu":
        rows = [row for row in rows if row[0] != 1]  # the most to sum, once for each tile of the interpreter's
    step = Step(rows, groups, heads, group, size, place, poisoned)
    got, want = step.run(sparse_attention, lse, config=config), step.run(reference.sparse_attention, lse)
    written = ~want[0].isnan()
    assert torch.equal(written, ~got[0].isnan()), "the two wrote different rows"
    close("out", got[0][written], want[0][written], dtype)
    if lse:
        assert torch.equal(want[1].isnan(), got[1].isnan())
        close("lse", got[1][~want[1].isnan()], want[1][~want[1].isnan()])
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-3, equal_nan=True)
    assert torch.equal(got[3], want[3])


@EACH_SHAPE
def test_reference_matches_softmax_over_what_was_read_and_copies_of_the_mean(
    groups, heads, group, size, poisoned, close
):
    step = Step(ROWS.values(), groups, heads, group, size, (torch.device("cpu"), torch.float32), poisoned)
    out, _, sums, summed = step.run(reference.sparse_attention)
    for r, (queries, length, count, slot, done) in enumerate(step.rows):
        tokens = slice(step.starts[r], step.starts[r + 1])
        end = max(min(step.lens[r], done + LONGEST), done) if slot >= 0 else 0
        if slot >= 0:
            assert summed[slot].tolist() == [end] * heads
            if end:
                torch.testing.assert_close(sums[slot], step.kv[r][:, :end].sum(1), rtol=1e-4, atol=1e-3)
        if count <= 0:
            assert out[tokens].isnan().all()
            continue
        for h in range(heads):
            read, kv = step.read[r, h if groups > 1 else 0], step.kv[r][h]
            mine = slice(h * group, (h + 1) * group)
            mean = kv[:end].sum(0, keepdim=True) / max(end, 1)
            mean = mean.expand(length - len(read) if end else 0, -1)
            both = torch.cat((kv[read], mean))
            mask = torch.zeros(queries, 1, len(both))
            for i in range(queries):
                mask[i, :, len(read) - (queries - 1 - i) : len(read)] = -torch.inf
            logits = step.query[tokens, mine] @ both[:, :size].T * size**-0.5
            close("out", out[tokens, mine], (logits + mask).softmax(-1) @ both[:, size:], torch.float32)
    others = [z for z in range(SLOTS) if z not in {row[3] for row in step.rows}]
    assert sums[others].isnan().all() and (summed[others] == 77).all()


@pytest.mark.parametrize("lse", [False, True])
def test_another_library_s_attention_is_given_the_mean_afterwards(lse, place, poisoned, close):
    """By a kernel of its own, from the logsumexp, which stays that of what was read."""
    step = Step(ROWS.values(), 1, 2, 2, 64, place, poisoned)
    totals = []

    def theirs(query, cache, table, kept, starts, scale, out, longest, total=None):
        totals.append(total)
        reference.sparse_attention(query, cache, table, kept, starts, scale, out, longest, total)

    got, want = step.run(with_mean(theirs), lse), step.run(reference.sparse_attention, lse)
    assert totals[0] is not None and (got[1] is totals[0]) == lse
    written = ~want[0].isnan()
    assert torch.equal(written, ~got[0].isnan())
    close("out", got[0][written], want[0][written], place[1])
    for ours, wanted in zip(got[2:], want[2:], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3, equal_nan=True)
    with_mean(theirs)(step.query, step.cache, *step.given, torch.empty_like(step.query), step.longest)
    assert totals[1] is None


@pytest.mark.parametrize("op", [sparse_attention, reference.sparse_attention], ids=["kernel", "reference"])
def test_where_all_is_read_it_is_attention_to_the_bit(op, place, poisoned):
    rows = [(2, 130, 130, 1, 90), (1, 20, 20, 2, 0), (2, 64, 64, 0, 64)]
    step = Step(rows, 1, 2, 2, 64, place, poisoned)
    plain = poisoned(step.query.shape, place[1], place[0])
    op(step.query, step.cache, *step.given, plain, step.longest)
    assert torch.equal(step.run(op)[0].nan_to_num(), plain.nan_to_num())


@pytest.mark.parametrize("op", [sparse_attention, reference.sparse_attention], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "slots: got 3 rows, wanted the 2 rows of the page table"),
        ({"lens": torch.zeros(3, dtype=torch.int32)}, r"lens: got shape \(3,\)"),
        ({"seq_lens": torch.zeros(2)}, "seq_lens: got torch.float32"),
        ({"sums": torch.zeros(SLOTS, 3, 128)}, r"sums: got shape \(11, 3, 128\)"),
    ],
    ids=["rows", "lens", "seq_lens", "sums"],
)
def test_means_are_refused(change, message, op, poisoned):
    step = Step([PRUNED, PRUNED], 1, 2, 2, 64, (torch.device("cpu"), torch.float32), poisoned)
    given = {"block_table": torch.zeros(3, 9, dtype=torch.int32), "lens": change.get("slots", step.mean.lens).int(),
             } if "slots" in change else {}  # fmt: skip
    step.mean = step.mean._replace(**{**given, **change})
    with pytest.raises(ValueError, match=message):
        step.run(op)

"""What stands for the tokens that a verification does not read: which rows are summed, and what attention becomes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specattn_vllm import executors
from specattn_vllm.kernels.unread_contracts import LONGEST
from specattn_vllm.selection.unread import PARTS, LayerUnread, Unread

CPU = torch.device("cpu")
OPERATIONS = executors.resolve("torch", CPU)
HEADS, SIZE, BLOCK, SCALE = 2, 8, 4, 0.3


def unread(slots: int = 3, layers: int = 2) -> Unread:
    shape = {"num_kv_heads": HEADS, "head_size": SIZE}
    return Unread(OPERATIONS, layers=layers, max_num_reqs=slots, device=CPU, **shape)


def begin(made: Unread, slots, prefilling, lens, queries, rows=None) -> None:
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    rows = len(slots) if rows is None else rows
    made.begin(
        torch.tensor(slots), torch.tensor(prefilling), any(prefilling[rows:]), starts,
        torch.tensor(lens, dtype=torch.int32), rows,
    )  # fmt: skip


def test_what_is_summed_is_what_the_cache_holds_for_good():
    made = unread()
    begin(made, [2, 0, -1], [False, True, False], [20, 9, 0], [5, 1, 0])
    # A row that prefills is none of those that verify, nor is padding.
    assert made.slots.tolist() == [2, -1, -1]
    assert made.lens[0] == 15


def test_rows_of_the_last_step_are_forgotten():
    made = unread()
    begin(made, [2, 0, 1], [False] * 3, [20, 9, 8], [5, 5, 5])
    begin(made, [1], [False], [9], [5])
    assert made.slots.tolist() == [1, -1, -1]


def test_a_request_that_enters_clears_its_slot_in_every_layer():
    made = unread()
    made.summed.fill_(7)
    made.forget(1)
    assert made.summed[:, 1].eq(0).all() and made.summed[:, [0, 2]].eq(7).all()


def test_prompts_are_summed_while_they_are_computed_with_what_the_prefix_cache_had():
    """Chunk after chunk, in one layer; rows that verify wait for their verification."""
    made, length = unread(), 19
    cache = torch.randn(6, HEADS, BLOCK, 2 * SIZE, generator=torch.Generator().manual_seed(1))
    table = torch.tensor([[0, 1, 2, 3, 5], [4, 1, 3, 0, 2]], dtype=torch.int32)
    kv = cache[table[1].long()].transpose(0, 1).reshape(HEADS, -1, 2 * SIZE)
    made.forget(0)
    for end, queries in ((11, 3), (length, 8)):  # the first 8 tokens were cached
        begin(made, [2, 0], [False, True], [9, end], [5, queries], rows=1)
        md = SimpleNamespace(block_table=table, max_seq_len=end)
        LayerUnread(made, 1).take_in(cache, md)
        assert made.summed[1, 0].tolist() == [end] * HEADS
        torch.testing.assert_close(made.sums[1, 0], kv[:, :end].sum(1))
    assert made.summed[0].eq(0).all() and made.summed[1, [1, 2]].eq(0).all()
    # A token more, padded to five, waits for a verification.
    begin(made, [0, 2], [True, False], [length + 5, 9], [5, 5])
    LayerUnread(made, 1).take_in(None, None)
    begin(made, [2, 0], [False, False], [9, length + 5], [5, 5])
    LayerUnread(made, 1).take_in(None, None)  # a step without prompts has nothing to do


@pytest.mark.parametrize(("prompts", "taken"), [(1, 9000), (PARTS // 3, 3 * LONGEST), (PARTS + 1, LONGEST)])
def test_what_prompts_take_at_a_time_is_bounded(prompts, taken):
    told = []
    made = unread(slots=1)
    made.operations = SimpleNamespace(sum_context=lambda *given: told.append(given[2:4] + given[6:]))
    begin(made, [0] * prompts, [True] * prompts, [9000] * prompts, [1] * prompts, rows=0)
    table = torch.zeros(prompts, 1, dtype=torch.int32)
    LayerUnread(made, 0).take_in(torch.empty(0), SimpleNamespace(block_table=table, max_seq_len=9000))
    [(slots, lens, longest)] = told
    assert (len(slots), len(lens), longest) == (prompts, prompts, taken)


@pytest.mark.parametrize("kept", [[[6]], [[6, 3]]], ids=["shared", "per head"])
def test_attention_is_that_of_what_was_read_and_of_the_mean_as_often_as_the_rest(kept):
    """Against softmax over the tokens that were read and as many copies of the mean as were not."""
    gen = torch.Generator().manual_seed(3)
    length, queries = 14, 2
    cache = torch.randn(5, HEADS, BLOCK, 2 * SIZE, generator=gen)
    table = torch.tensor([[3, 0, 4, 1]], dtype=torch.int32)
    kv = cache[table[0].long()].transpose(0, 1).reshape(HEADS, -1, 2 * SIZE)[:, :length]
    query = torch.randn(queries, 2 * HEADS, SIZE, generator=gen)
    counts = torch.tensor(kept, dtype=torch.int32)
    out, wanted = torch.empty_like(query), torch.empty_like(query)
    # Pages of the tokens that are read, the last of which are the verification's own.
    places = [[*range(int(count) - queries), *range(length - queries, length)] for count in counts[0]]
    pages = torch.zeros(1, len(kept[0]), max(map(len, places)), dtype=torch.int32)
    for g, place in enumerate(places):
        for j, p in enumerate(place):
            pages[0, g, j] = (int(table[0, p // BLOCK]) * HEADS + g) * BLOCK + p % BLOCK
    for h in range(2 * HEADS):
        read = places[h // 2 if counts.shape[1] > 1 else 0]
        keys, values = kv[h // 2, read].split(SIZE, -1)
        mean, rest = kv[h // 2, : length - queries].mean(0), length - len(read)
        logits = query[:, h] @ keys.T * SCALE
        logits[0, -1] = -torch.inf  # the first token does not see the second
        more = (query[:, h] @ mean[:SIZE] * SCALE)[:, None].expand(-1, rest)
        both = torch.cat((values, mean[SIZE:].expand(rest, -1)))
        wanted[:, h] = torch.cat((logits, more), 1).softmax(-1) @ both
    made = unread()
    begin(made, [1], [False], [length], [queries])
    md = SimpleNamespace(
        sparse=SimpleNamespace(num_rows=1, max_query_len=queries), block_table=table,
        seq_lens=torch.tensor([length], dtype=torch.int32), query_start_loc=torch.tensor([0, queries]).int(),
    )  # fmt: skip
    mean = LayerUnread(made, 1).mean(md)
    OPERATIONS.sparse_attention(query, cache, pages, counts, md.query_start_loc, SCALE, out, queries, None, mean)
    torch.testing.assert_close(out, wanted)
    assert made.summed[1, 1].tolist() == [length - queries] * HEADS
    assert made.summed[0].eq(0).all(), "another layer's"

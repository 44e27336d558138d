"""Keys and queries of any kind, NaN, infinities, ties and denormals among them, and flipped bits in codes and scales:
each choice is one, and no row's changes another's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_vllm.kernels.sketch import reference
from specattn_vllm.kernels.sketch.contracts import Budget
from specattn_vllm.kernels.sketch.cuts import cut_scores
from specattn_vllm.kernels.sketch.encode import encode_keys
from specattn_vllm.kernels.sketch.pages import list_pages
from specattn_vllm.kernels.sketch.queries import prepare_queries
from specattn_vllm.kernels.sketch.scores import score_tokens

BLOCK, SIZE, HEADS, CONTEXT = 16, 64, 2, 150
BUDGETS = [Budget(0.1, shared="none", min_tokens=20, recent=16), Budget(0.3, recent=8), Budget(0.5, top_p=0.7)]
REFERENCES = (
    reference.encode_keys,
    reference.prepare_queries,
    reference.score_tokens,
    reference.cut_scores,
    reference.list_pages,
)
KERNELS = (encode_keys, prepare_queries, score_tokens, cut_scores, list_pages)


def make_strange(data, keys, queries, encode):
    """Give the second row these keys [tokens, HEADS, SIZE] and queries [its own, query heads, SIZE]."""
    p = torch.arange(int(data.seq_lens[1]), device=data.query.device)
    slots = data.block_table[1, p // BLOCK].long() * BLOCK + p % BLOCK
    encode(keys, slots, data.rotation, data.centre, data.codes, data.scales)
    data.query[int(data.query_start_loc[1]) : int(data.query_start_loc[2])] = queries


def flip(data, of_code: int, of_scale: int):
    """Flip bits of all codes and scales of the second row, as broken memory might."""
    blocks = data.block_table[1, : -(-int(data.seq_lens[1]) // BLOCK)].long()
    data.codes[blocks] ^= of_code
    data.scales[blocks] = (data.scales[blocks].view(torch.int16) ^ of_scale).view(torch.float16)


def choose(operations, data, prepared, scored, selected, budget):
    _, prepare, score, cut, pages = operations
    packed, factors, _ = prepared(prepare, data)
    found = scored(score, data, packed, factors, budget.sink, budget.recent)
    return selected(cut, pages, data, *found, budget)


def check_choice(data, table, kept, budget):
    """Pages of the row's own tokens, in order, once each, with those that are always read."""
    block, per_head, token = data.page_strides
    for row in range(data.rows):
        length, context = int(data.seq_lens[row]), data.context(row)
        p = torch.arange(length)
        places = data.block_table[row].cpu()[p // BLOCK].long() * block + p % BLOCK * token
        always = {*range(min(budget.sink, context)), *range(max(context - budget.recent, 0), length)}
        for head in range(HEADS):
            position = {int(place) + head * per_head: i for i, place in enumerate(places)}
            read = [position[page] for page in table[row, head, : kept[row, head]].tolist()]
            assert read == sorted(set(read)) and always <= set(read)
        wanted = min(max((context * budget.fixed_ratio + 65535) >> 16, budget.min_tokens), context)
        if budget.top_p is None:
            new = length - context
            assert int(kept[row].sum()) == HEADS * (wanted + new)


@pytest.fixture
def run(any_numbers, sketched, prepared, scored, selected):
    """run(operations, device, drawn): the choices for two rows, of which the second has any keys and queries."""

    def run(operations, device, drawn):
        keys = any_numbers(drawn, (CONTEXT + 3, HEADS, SIZE)).to(device)
        flips = drawn.draw(st.integers(0, 255)), drawn.draw(st.integers(-(2**15), 2**15 - 1))
        queries = any_numbers(drawn, (3, 2 * HEADS, SIZE)).to(device)
        for budget in BUDGETS:
            batch = ([CONTEXT + 2, CONTEXT + 3], [2, 3], HEADS, 2, SIZE, 2, BLOCK, "LBNHC", device, torch.float32)
            alone, data = sketched(*batch), sketched(*batch)
            make_strange(data, keys, queries, operations[0])
            flip(data, *flips)
            before, after = (choose(operations, b, prepared, scored, selected, budget) for b in (alone, data))
            check_choice(data, after[2].cpu(), after[3].cpu(), budget)
            # The first row has nothing to do with it.
            for mine, its in zip(before, after, strict=True):
                assert torch.equal(mine[0], its[0])

    return run


@settings(max_examples=40)
@given(data=st.data())
def test_any_keys_and_queries_make_a_choice(run, data):
    run(REFERENCES, torch.device("cpu"), data)


@settings(max_examples=4)
@given(data=st.data())
def test_any_keys_and_queries_make_a_choice_of_the_kernels(device, run, data):
    run(KERNELS, device, data)

"""Attention without a cache, by which centres are measured."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.sketch.layer import attend_densely


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("flat", [False, True])
def test_a_row_sees_what_is_before_it_in_its_window(window, flat):
    tokens, heads, kv_heads, size = 9, 4, 2, 8
    query, key, value = (torch.randn(tokens, n, size) for n in (heads, kv_heads, kv_heads))
    output = torch.full((tokens, heads, size), torch.nan)
    given = [x.flatten(1) if flat else x for x in (query, key, value, output)]
    attend_densely(*given[:3], 0.5, given[3], head_size=size, window=window)
    for row in range(tokens):
        first = 0 if window is None else max(0, row + 1 - window)
        for head in range(heads):
            keys, values = (x[first : row + 1, head // 2] for x in (key, value))
            weights = (keys @ query[row, head] * 0.5).softmax(0)
            torch.testing.assert_close(output[row, head], weights @ values)

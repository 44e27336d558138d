"""Which slots of the cache a request found filled."""

import pytest
import torch

pytest.importorskip("vllm")

from specattn_vllm.backend.filled import slots


@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 11, 12])
def test_slots_are_those_of_the_first_tokens(tokens):
    blocks = [7, 2, 9, 1]
    found = slots(blocks, 4, tokens, torch.device("cpu"))
    assert found.tolist() == [blocks[i // 4] * 4 + i % 4 for i in range(tokens)]
    assert found.dtype == torch.int64

"""The rotation of keys and queries: every head size that is served has one."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.kernels.contracts import HEAD_SIZES
from specattn_vllm.sketch.rotation import rotation

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [*HEAD_SIZES, 1, 12, 24])
def test_it_is_orthogonal_and_has_whole_numbers(size):
    matrix = rotation(size, torch.float32, CPU)
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))
    assert torch.equal(matrix.abs(), torch.ones(size, size))
    assert torch.equal(matrix, rotation(size, torch.bfloat16, CPU).float())


@pytest.mark.parametrize("size", [3, 36, 80, 100])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=rf"head sizes of 2\^n or 12 \* 2\^n, not {size}"):
        rotation(size, torch.float32, CPU)

"""A batch that the interpreter gets through."""

from __future__ import annotations

import pytest
import torch

from specattn_vllm.bench import grid
from specattn_vllm.bench.kernels.inputs import Setup
from specattn_vllm.tools import models


@pytest.fixture
def setup():
    """setup(cell, kept): of the demo pair, on this machine's GPU or in the interpreter."""
    torch.manual_seed(0)

    def make(cell: str = "2x100", kept: float | None = None) -> Setup:
        cuda = torch.cuda.is_available()
        device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
        return Setup(device, dtype, models.load_shape(models.DEMO), grid.Cell.parse(cell), kept)

    return make

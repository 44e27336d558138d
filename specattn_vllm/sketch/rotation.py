"""The rotation of keys and queries: random signs, then a Hadamard matrix."""

from __future__ import annotations

import torch

SEED = 20260828


def rotation(head_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[D, D] of +1 and -1; divided by sqrt(D) it is orthogonal. It is the same in every process: no code outlives its
    process, but all ranks and all restarts should choose the same tokens.

    Raises ValueError if the head size is not a power of two, because then there is no such matrix.
    """
    if head_size & (head_size - 1):
        raise ValueError(f"a sketch needs head sizes that are powers of two, not {head_size}: use another method")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < head_size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(0, 2, (head_size, 1), generator=generator) * 2 - 1
    return (signs * matrix).to(dtype).to(device)

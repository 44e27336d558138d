"""The rotation of keys and queries: random signs, then a Hadamard matrix."""

from __future__ import annotations

import torch

SEED = 20260828


def _paley(prime: int) -> torch.Tensor:
    """A Hadamard matrix of order prime + 1, for a prime that is 3 modulo 4 (Paley, 1933)."""
    squares = {n * n % prime for n in range(1, prime)}
    signs = torch.tensor([0, *(1 if n in squares else -1 for n in range(1, prime))])
    place = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = signs[(place[None, :] - place[:, None]) % prime] + torch.eye(prime)
    return matrix


def rotation(head_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[D, D] of +1 and -1; divided by sqrt(D) it is orthogonal. It is the same in every process: no code outlives its
    process, but all ranks and all restarts should choose the same tokens.

    Raises ValueError if the head size is neither a power of two nor twelve times one: there is no simple matrix then.
    """
    matrix = _paley(11) if head_size % 3 == 0 else torch.ones(1, 1)
    while matrix.shape[0] < head_size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    if matrix.shape[0] != head_size:
        raise ValueError(f"a sketch needs head sizes of 2^n or 12 * 2^n, not {head_size}: use another method")
    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(0, 2, (head_size, 1), generator=generator) * 2 - 1
    return (signs * matrix).to(dtype).to(device)

"""Inputs of the kernel benchmark: one stretch of device memory that every case takes its cache layers from, random
selections as page tables, and attention mass with a realistic shape."""

from __future__ import annotations

from typing import NamedTuple

import torch

from specattn_vllm.bench.kernel_shapes import BLOCK_SIZE, FIRST_STEP_LEN, Batch, Heads, words
from specattn_vllm.bench.kernel_timing import CALLS

# Layers of at least this much in all: many times L2, little beside the GPU's memory.
ROTATION_BYTES = 6 << 30


def layer_count(bytes_per_layer: int, limit: int = CALLS, wanted: int = ROTATION_BYTES) -> int:
    return max(min(-(-wanted // max(bytes_per_layer, 1)), limit), 1)


def page_numel(heads: Heads) -> int:
    """Elements of a block's keys and values."""
    return BLOCK_SIZE * heads.kv * 2 * heads.size


class Arena:
    """Device memory filled once with random numbers, shared by all cases; grows to the largest request."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._flat = torch.empty(0, dtype=dtype, device=device)

    def layers(self, heads: Heads, batch: Batch, tail: int = 0) -> list[torch.Tensor]:
        """Cache layers [B, H, N, 2D] in vLLM's layout with tokens outermost, each block with a tail of so many elements
        behind it."""
        blocks, page = batch.rows * batch.blocks, page_numel(heads) + tail
        numel = blocks * page
        count = layer_count(numel * self._flat.element_size()) if self.device.type == "cuda" else 2
        if self._flat.numel() < count * numel:
            self._flat = torch.empty(0, dtype=self.dtype, device=self.device)  # the old one goes first
            self._flat = torch.empty(count * numel, dtype=self.dtype, device=self.device)
            for part in self._flat.split(1 << 28):
                part.normal_()
        pages = self._flat[: count * numel].view(count, blocks, page)[..., : page - tail]
        return list(pages.unflatten(-1, (BLOCK_SIZE, heads.kv, 2 * heads.size)).transpose(2, 3))


class Requests(NamedTuple):
    """A batch in which every request has the same lengths: what vLLM hands to attention."""

    block_table: torch.Tensor  # [R, nb] int32, blocks in no order
    seq_lens: torch.Tensor  # [R] int32
    query_start_loc: torch.Tensor  # [R + 1] int32
    query: torch.Tensor  # [R * q_len, Hq, D]
    out: torch.Tensor


def requests(heads: Heads, batch: Batch, q_len: int, device: torch.device, dtype: torch.dtype) -> Requests:
    rows = batch.rows
    return Requests(
        torch.randperm(rows * batch.blocks, device=device).view(rows, batch.blocks).int(),
        torch.full((rows,), batch.context, dtype=torch.int32, device=device),
        torch.arange(0, rows * q_len + 1, q_len, dtype=torch.int32, device=device),
        torch.randn(rows * q_len, heads.query, heads.size, device=device).to(dtype),
        torch.empty(rows * q_len, heads.query, heads.size, dtype=dtype, device=device),
    )


def random_positions(batch: Batch, groups: int, kept: int, device: torch.device) -> torch.Tensor:
    """[R, G, kept] int64, ascending: uniform without replacement, but for the new tokens, which are always last."""
    new = FIRST_STEP_LEN
    keys = torch.rand(batch.rows, groups, batch.context, device=device)
    keys[..., batch.context - new :] += 1
    return keys.topk(kept, dim=-1, sorted=False).indices.sort(-1).values


def page_table(
    positions: torch.Tensor, block_table: torch.Tensor, strides: tuple[int, int, int], width: int
) -> torch.Tensor:
    """[R, G, width] int32 page ids of positions [R, G, kept]; ids past them are 0."""
    rows, groups, kept = positions.shape
    block, head, token = strides
    blocks = block_table.long().gather(1, (positions // BLOCK_SIZE).flatten(1)).view_as(positions)
    ids = blocks * block + (positions % BLOCK_SIZE) * token
    if groups > 1:
        ids += torch.arange(groups, device=ids.device)[:, None] * head
    table = torch.zeros(rows, groups, width, dtype=torch.int32, device=ids.device)
    table[..., :kept] = ids
    return table


def pack_bits(positions: torch.Tensor, context: int) -> torch.Tensor:
    """[..., words] int32 with a bit for each of positions [..., kept]."""
    width = words(context)
    flags = torch.zeros(*positions.shape[:-1], width * 32, dtype=torch.bool, device=positions.device)
    flags.scatter_(-1, positions, True)
    weights = torch.ones((), dtype=torch.int64, device=flags.device) << torch.arange(32, device=flags.device)
    packed = [(part.view(-1, width, 32) * weights).sum(-1) for part in flags.view(-1, width * 32).split(256)]
    # 2^31 does not fit int32: the cast wraps.
    return torch.cat(packed).to(torch.int32).view(*positions.shape[:-1], width)


def realistic_mass(rows: int, context: int, device: torch.device) -> torch.Tensor:
    """[rows, L] float32: softmax of normal logits, one token in 200 and the first few of them heavy; a row sums to a
    little less than 1."""
    mass = torch.empty(rows, context, device=device)
    for part in mass.split(256):
        part.normal_(std=1.5)
        part[torch.rand_like(part) < 1 / 200] += 6
        part[:, :4] += 6
        part.copy_(part.softmax(-1).mul_(0.999))
    return mass

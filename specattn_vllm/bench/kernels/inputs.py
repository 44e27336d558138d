"""Inputs of the kernels: cache layers, requests, and random selections as page tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from specattn_vllm import executors
from specattn_vllm.bench.grid import Cell
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.tools.models import Shape

BLOCK_SIZE = 16  # tokens of a block of vLLM's cache
VERIFY_LEN = 6  # rows of a verification of 5 drafts
# Operands take turns, so that none of them is found in L2: as many as make this much, at most.
ROTATION_BYTES, MOST = 6 << 30, 20


class Heads(NamedTuple):
    """Attention of one layer."""

    query: int
    kv: int
    size: int


class Requests(NamedTuple):
    """A batch in which every request has the same lengths: what vLLM hands to attention."""

    block_table: torch.Tensor  # [R, nb] int32, blocks in no order
    seq_lens: torch.Tensor  # [R] int32
    query_start_loc: torch.Tensor  # [R + 1] int32
    query: torch.Tensor  # [R * q_len, Hq, D]
    out: torch.Tensor


class Setup:
    """One batch of one pair of models on one device, and what is made for it."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: Shape, cell: Cell, kept: float | None) -> None:
        """The cell's context is that of a verification, its own tokens included; kept: share of it."""
        self.device, self.dtype, self.kept = device, dtype, kept
        self.rows, self.context = cell
        self.blocks = -(-self.context // BLOCK_SIZE)
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        self.target, self.draft = (Heads(*(shape.configs[r][n] for n in names)) for r in ("target", "draft"))
        name = "auto" if device.type == "cuda" else "triton"
        self.operations = executors.resolve(name, device, dtype, per_head=True)
        self._made: tuple[Any, Any] = (None, None)

    def kept_tokens(self, share: float) -> int:
        """Entries of a page table that holds `kept` of the context, or a share; the new tokens are among them."""
        return min(self.context, max(round(self.context * (self.kept or share)), VERIFY_LEN + 1))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes, kept until something else is asked for: there is no memory for two of them."""
        if self._made[0] != key:
            self._made = (None, None)
            self._made = (key, make())
        return self._made[1]

    def turns(self, nbytes: int, wanted: int = ROTATION_BYTES) -> int:
        return 2 if self.device.type != "cuda" else max(min(-(-wanted // nbytes), MOST), 1)

    def layers(self, heads: Heads) -> list[torch.Tensor]:
        return self.once(heads, lambda: self.make_layers(heads))

    def make_layers(self, heads: Heads, tail: int = 0) -> list[torch.Tensor]:
        """Cache layers [B, H, N, 2D] in vLLM's layout with tokens outermost, each block with a tail of so many elements
        behind it."""
        blocks, page = self.rows * self.blocks, BLOCK_SIZE * heads.kv * 2 * heads.size + tail
        count = self.turns(blocks * page * self.dtype.itemsize)
        memory = torch.empty(count, blocks, page, dtype=self.dtype, device=self.device)
        for layer in memory:
            layer.normal_()
        pages = memory[..., : page - tail].unflatten(-1, (BLOCK_SIZE, heads.kv, 2 * heads.size))
        return list(pages.transpose(2, 3))

    def requests(self, heads: Heads, q_len: int) -> Requests:
        rows, device = self.rows, self.device
        blocks = torch.randperm(rows * self.blocks, device=device)
        return Requests(
            blocks.view(rows, -1).int(),
            torch.full((rows,), self.context, dtype=torch.int32, device=device),
            torch.arange(0, rows * q_len + 1, q_len, dtype=torch.int32, device=device),
            torch.randn(rows * q_len, heads.query, heads.size, device=device).to(self.dtype),
            torch.empty(rows * q_len, heads.query, heads.size, dtype=self.dtype, device=device),
        )

    def positions(self, groups: int, kept: int) -> torch.Tensor:
        """[R, G, kept] int64, ascending: uniform without replacement, but for the new tokens, which are always last."""
        keys = torch.rand(self.rows, groups, self.context, device=self.device)
        keys[..., self.context - VERIFY_LEN :] += 1
        return keys.topk(kept, dim=-1, sorted=False).indices.sort(-1).values

    def page_table(self, positions: torch.Tensor, block_table: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        """[R, G, context] int32 page ids of positions [R, G, kept]; ids past them are 0."""
        rows, groups, kept = positions.shape
        block, head, token = page_strides(layer)
        blocks = block_table.long().gather(1, (positions // BLOCK_SIZE).flatten(1)).view_as(positions)
        ids = blocks * block + (positions % BLOCK_SIZE) * token
        if groups > 1:
            ids += torch.arange(groups, device=ids.device)[:, None] * head
        table = torch.zeros(rows, groups, self.context, dtype=torch.int32, device=ids.device)
        table[..., :kept] = ids
        return table

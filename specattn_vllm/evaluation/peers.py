"""Other work's selections in the place of ours, for comparison: same text, positions, rows and accounting.

A peer attends for the rows that verify, in plain PyTorch over the paged cache, in engines without graphs; prompts stay
dense. As with our methods, one selection serves all K + 1 rows of a verification, is made of the tokens before them
(the prefix), and the rows read each other besides, causally. Whatever chooses per query in its paper chooses here by
the mean over the rows, and over the query heads of a KV head, of a distribution, since that is what is read together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from specattn_vllm.evaluation.peer_options import Oracle, Quest
from specattn_vllm.executors import Operations
from specattn_vllm.stats import Counters


class Rows(NamedTuple):
    """The rows V of one step that verify, in one layer, padded to the longest: Q tokens each, L positions."""

    query: torch.Tensor
    """[V, H, G, Q, D] float32: G query heads for each of the H KV heads; zeros where a row has fewer tokens."""
    keys: torch.Tensor
    """[V, H, L, D] float32, arbitrary past the sequence's end."""
    values: torch.Tensor
    """Likewise, zeros past the end."""
    real: torch.Tensor
    """[V, Q] bool: tokens that are there."""
    prefix: torch.Tensor
    """[V] int64: positions before the first of them."""
    scale: float

    @property
    def positions(self) -> torch.Tensor:
        """[L]"""
        return torch.arange(self.keys.shape[2], device=self.keys.device)

    @property
    def in_prefix(self) -> torch.Tensor:
        """[V, L] bool"""
        return self.positions < self.prefix[:, None]

    def logits(self) -> torch.Tensor:
        """[V, H, G, Q, L], -inf where a token cannot see."""
        tokens = torch.arange(self.real.shape[1], device=self.real.device)
        last = self.prefix[:, None] + tokens.minimum(self.real.sum(-1, keepdim=True) - 1)
        visible = self.positions <= last[:, :, None]
        found = torch.einsum("vhgqd,vhld->vhgql", self.query, self.keys) * self.scale
        return found.masked_fill_(~visible[:, None, None], -torch.inf)

    def mean(self, found: torch.Tensor) -> torch.Tensor:
        """Mean of [V, H, G, Q, X] over the query heads and the tokens that are there: [V, H, X]."""
        weights = self.real / self.real.sum(-1, keepdim=True)
        return torch.einsum("vhgqx,vq->vhx", found, weights.to(found.dtype)) / found.shape[2]


def select_quest(options: Quest, rows: Rows, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens kept [V, H, L] bool, and entries searched to find them [V, H]: those of all pages, of which the least and
    the largest key are read.

    A page's bound is the sum over dimensions of the larger of q * least and q * largest. The page that the prefix ends
    in is always among those that are read.
    """
    size, inside = options.page_size, rows.in_prefix
    pages = -(-inside.shape[1] // size)
    padding = pages * size - inside.shape[1]
    paged = F.pad(rows.keys, (0, 0, 0, padding)).unflatten(2, (pages, size))
    there = F.pad(inside, (0, padding)).unflatten(1, (pages, size))[:, None, :, :, None]
    least = paged.masked_fill(~there, torch.inf).amin(3)
    largest = paged.masked_fill(~there, -torch.inf).amax(3)
    count = (rows.prefix + size - 1) // size
    page = torch.arange(pages, device=inside.device)
    used = page < count[:, None]
    # Zero times infinity would be no number.
    least, largest = (bound.masked_fill(~used[:, None, :, None], 0.0) for bound in (least, largest))
    above = torch.einsum("vhgqd,vhpd->vhgqp", rows.query.clamp(min=0), largest)
    bounds = (above + torch.einsum("vhgqd,vhpd->vhgqp", rows.query.clamp(max=0), least)) * rows.scale
    # For a single query, the order of a softmax is that of the bounds.
    weights = rows.mean(bounds.masked_fill(~used[:, None, None, None], torch.finfo(bounds.dtype).min).softmax(-1))
    weights = weights.masked_fill((page == count[:, None] - 1)[:, None], torch.inf)
    wanted = (budget(options.ratio, rows.prefix) + size - 1) // size
    kept = heaviest(weights, used[:, None], wanted[:, None, None])
    tokens = kept.repeat_interleave(size, dim=2)[:, :, : inside.shape[1]] & inside[:, None]
    return tokens, (count * size)[:, None].expand(kept.shape[:2])


def select_oracle(options: Oracle, rows: Rows, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `select_quest`; what finding them reads is not counted."""
    inside = rows.in_prefix[:, None]
    mass = rows.mean(logits.softmax(-1)).masked_fill_(~inside, 0.0)
    if options.shared:
        mass = mass.mean(1, keepdim=True)
    if options.ratio is not None:
        wanted = budget(options.ratio, rows.prefix)[:, None, None]
    else:
        ordered = mass.double().sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        # Shares of the prefix's mass, as in our top-p; what the rows give each other is kept anyway.
        wanted = (before < options.top_p * ordered.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        wanted = wanted.minimum(rows.prefix[:, None, None])
    kept = heaviest(mass, inside, wanted).expand(-1, rows.keys.shape[1], -1)
    return kept, torch.zeros(kept.shape[:2], dtype=torch.int64, device=kept.device)


def budget(ratio: float, length: torch.Tensor) -> torch.Tensor:
    """Tokens for a share of lengths [V] int64, rounded as `select_top_p` does."""
    return (length * round(ratio * 65536) + 65535) >> 16


def heaviest(weights: torch.Tensor, inside: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` largest of weights [V, H, X] among those inside, as [V, H, X] bool; `inside` and `count` spread."""
    order = weights.masked_fill(~inside, -1.0).sort(dim=-1, descending=True, stable=True).indices
    taken = (torch.arange(weights.shape[2], device=weights.device) < count).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, taken) & inside


SELECT = {"quest": select_quest, "oracle": select_oracle}


def install(worker: Any, options: Quest | Oracle) -> None:
    """Put a peer into the target of a worker whose options are method 'dense'."""
    from vllm.model_executor.models.utils import extract_layer_index

    from specattn_vllm.speculation.wiring import target_builder

    groups, speculator = worker.model_runner.attn_groups, worker.model_runner.speculator
    names = {name for of in groups for group in of for name in group.layer_names}
    names = sorted(names - speculator.draft_attn_layer_names, key=extract_layer_index)
    builder = target_builder(groups, names)
    builder.peer = Peer(options, speculator.operations, speculator.counters, names)


class Peer:
    """One peer in one engine: tells which rows of a step verify, and attends for them."""

    def __init__(
        self, options: Quest | Oracle, operations: Operations, counters: Counters, layer_names: list[str]
    ) -> None:
        """layer_names: the target's, in order."""
        if options.dense_layers >= len(layer_names):
            raise ValueError(
                f"peer {options.name!r}: dense_layers {options.dense_layers} leaves none of the target's "
                f"{len(layer_names)} layers to select in: lower it"
            )
        self.options = options
        self.operations = operations
        self.counters = counters
        self.selecting = set(layer_names[options.dense_layers :])

    def begin(self, common: Any) -> PeerStep | None:
        """The step of vLLM's common metadata; None where nothing verifies, as in profiling runs and prompts."""
        if common.req_idx is None or common.is_prefilling is None:
            return None
        real = len(common.req_idx)
        starts = common.query_start_loc_cpu[: real + 1].long()
        counts = starts[1:] - starts[:-1]
        [rows] = ((counts > 0) & ~common.is_prefilling[:real].cpu()).nonzero(as_tuple=True)
        if not rows.numel():
            return None
        offset = torch.arange(int(counts[rows].max()))
        there = offset < counts[rows, None]
        tokens = torch.where(there, starts[rows, None] + offset, starts[rows, None])
        device = common.seq_lens.device
        self.counters.stage(verify_rows=rows.numel(), sparse_rows=rows.numel())
        return PeerStep(self, rows.to(device), tokens.to(device), there.to(device))


@dataclass(frozen=True)
class PeerStep:
    """One step of the target in which rows verify: rows [V] of the batch, their tokens [V, Q] and which are there."""

    peer: Peer
    rows: torch.Tensor
    tokens: torch.Tensor
    there: torch.Tensor

    def attend(self, layer_name: str, query, kv_cache, batch, scale: float, out) -> bool:
        """Attention of one layer, for all rows; arguments as `TargetStep.attend`, kv_cache [B, H, N, 2D]."""
        md, counters = batch, self.peer.counters
        self.peer.operations.dense_attention(
            query, kv_cache, md.block_table, md.seq_lens, md.query_start_loc, scale, out, md.max_query_len,
            md.max_seq_len,
        )  # fmt: skip
        heads, lens = kv_cache.shape[1], md.seq_lens[self.rows].long()
        full = lens.sum() * heads
        if layer_name not in self.peer.selecting:
            counters.stage(kv_read=full, kv_full=full)
            return True
        rows = self._rows(query, kv_cache, md.block_table[self.rows], lens, md.max_seq_len, scale)
        logits = rows.logits()
        kept, searched = SELECT[self.peer.options.name](self.peer.options, rows, logits)
        read = kept | ~rows.in_prefix[:, None]
        weights = logits.masked_fill_(~read[:, :, None, None], -torch.inf).softmax(-1)
        found = torch.einsum("vhgql,vhld->vqhgd", weights, rows.values).flatten(2, 3)
        out[self.tokens[self.there]] = found[self.there].to(out.dtype)
        own = self.there.sum() * heads
        counters.stage(kv_read=kept.sum() + own, kv_full=full, kv_scanned=searched.sum())
        return True

    def _rows(self, query, kv_cache, block_table, lens, longest: int, scale: float) -> Rows:
        heads, block, width = kv_cache.shape[1:]
        longest = min(longest, block_table.shape[1] * block)
        # Blocks past a sequence's end are whatever stood there before.
        blocks = -(-longest // block)
        used = torch.arange(blocks, device=lens.device) * block < lens[:, None]
        picked = kv_cache[block_table[:, :blocks].long().masked_fill(~used, 0)]
        entries = picked.transpose(1, 2).flatten(2, 3)[:, :, :longest].float()
        keys, values = entries.split(width // 2, dim=-1)
        there = torch.arange(longest, device=lens.device) < lens[:, None]
        asked = query[self.tokens].masked_fill(~self.there[..., None, None], 0).float()
        return Rows(
            query=asked.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4),
            keys=keys,
            values=values.masked_fill(~there[:, None, :, None], 0.0),
            real=self.there,
            prefix=lens - self.there.sum(-1),
            scale=scale,
        )

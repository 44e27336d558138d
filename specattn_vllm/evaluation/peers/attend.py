"""Puts a peer into an engine: which rows of a step verify, and their attention to what was chosen for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from specattn_vllm.evaluation.peer_options import PeerOptions
from specattn_vllm.evaluation.peers import channels, mean_std, oracle, quest
from specattn_vllm.evaluation.peers.rows import Rows
from specattn_vllm.executors import Operations
from specattn_vllm.stats import Counters

SELECT = {
    "quest": quest.select,
    "mean_std": mean_std.select,
    "channels": channels.select,
    "oracle": oracle.select,
}


def install(worker: Any, options: PeerOptions) -> None:
    """Put a peer into the target of a worker whose options are method 'dense'."""
    from vllm.model_executor.models.utils import extract_layer_index

    from specattn_vllm.speculation.wiring import target_builder

    groups, speculator = worker.model_runner.attn_groups, worker.model_runner.speculator
    names = {name for of in groups for group in of for name in group.layer_names}
    names = sorted(names - speculator.draft_attn_layer_names, key=extract_layer_index)
    builder = target_builder(groups, names)
    builder.substitute = Peer(options, speculator.operations, speculator.counters, names).begin


class Peer:
    """One peer in one engine: tells which rows of a step verify, and attends for them."""

    def __init__(
        self, options: PeerOptions, operations: Operations, counters: Counters, layer_names: list[str]
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

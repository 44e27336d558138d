"""The target's own attention in its last verification.

If the target drafts for itself (Vegas, arXiv 2602.07223), its verification is dense and stores the scores of two query
rows per request. The tokens that these rows attended to are the ones that the target reads while it drafts the next
round. A selection is made and used within one step, so it stays in batch order and nothing is stored by request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.selection.choose import Limits, choose
from specattn_vllm.selection.plan import short_rows

if TYPE_CHECKING:
    from specattn_vllm.backend.metadata import SpecAttnMetadata

SCORED = 2  # query rows per request


class TargetCapture:
    """Attention mass of the target's layers in one step, and the bitmasks made from it.

    Order of calls in a step: `begin` outside of any CUDA graph, `attend` of the returned `TargetStep` in each layer,
    then `select`. Buffers keep their addresses, so verification and drafting can each be captured in a CUDA graph.

    The mass of a layer is the softmax weight of the scored rows, averaged over both rows and over all query heads.
    """

    def __init__(
        self,
        operations: Operations,
        limits: Limits,
        *,
        layer_sources: dict[str, int],
        num_heads: int,
        max_query_len: int,
        max_num_reqs: int,
        max_model_len: int,
        dilation: int,
        device: torch.device,
        score_dtype: torch.dtype,
    ) -> None:
        """layer_sources: vLLM's name of each target layer -> its index. max_query_len: most tokens of a verification,
        K + 1. dilation: positions by which the mass is spread forward. score_dtype: of `capture.dtype_of_scores`."""
        self.operations = operations
        self.limits = limits
        self.layer_sources = layer_sources
        self.max_query_len = max_query_len
        self.weight = 1 / (SCORED * num_heads)
        self.dilation = dilation
        layers, words = len(layer_sources), -(-max_model_len // 32)
        rows = SCORED * num_heads
        self.scores = torch.empty((max_num_reqs, rows, max_model_len), dtype=score_dtype, device=device)
        self.lse = torch.empty((max_num_reqs, rows), dtype=torch.float32, device=device)
        # Requests are the first dimension, so that the rows of any batch, padded or not, are one contiguous block.
        shape = (max_num_reqs, layers, 1)
        self.mass = torch.empty((*shape, max_model_len), dtype=torch.float32, device=device)
        if dilation:
            self._sharp = torch.empty((max_num_reqs, 1, max_model_len), dtype=torch.float32, device=device)
        self.bits = torch.empty((*shape, words), dtype=torch.int32, device=device)
        self.counts = torch.empty(shape, dtype=torch.int32, device=device)
        self.scored_rows = torch.full((max_num_reqs, SCORED), -1, dtype=torch.int64, device=device)
        self.lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.alone = torch.arange(max_num_reqs + 1, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each kind of buffer."""
        return {
            "scores": self.scores.nbytes + self.lse.nbytes,
            "mass": self.mass.nbytes + (self._sharp.nbytes if self.dilation else 0),
            "bitmasks": self.bits.nbytes + self.counts.nbytes,
        }

    def begin(
        self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, query_start_loc_cpu: torch.Tensor
    ) -> TargetStep:
        """Announce a step of R rows: query_start_loc [R+1] and seq_lens [R] int32; query_start_loc also on the host.
        Short rows use the kernel that stores scores while it attends."""
        self.operations.mark_rows(query_start_loc, seq_lens, self.max_query_len, self.scored_rows, self.lens)
        return TargetStep(self, *short_rows(query_start_loc_cpu, self.max_query_len))

    def record(self, layer: int, rows: int) -> None:
        """Make the mass of a layer from the stored scores of the first `rows` rows of the batch."""
        lens, mass = self.lens[:rows], self.mass[:rows, layer]
        target = self._sharp[:rows] if self.dilation else mass
        self.operations.accumulate_mass(self.scores[:rows], self.lse[:rows], lens, target, self.weight, "store")
        if self.dilation:
            self.operations.dilate_mass(target[:, 0], lens, mass[:, 0], self.dilation, 1.0 / (self.dilation + 1))

    def select(self, wanted: torch.Tensor, committed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the selections from the verification that has just run.

        wanted [R] bool: rows for which tokens are drafted next. committed [R] int32: tokens of each row, with the newly
        accepted ones. Returns bits [R, S, 1, W] and prefix_lens [R] int32. Positions from prefix_lens on are not
        ranked; the reader must keep them.
        """
        rows = wanted.shape[0]
        lens = torch.where(wanted, torch.minimum(self.lens[:rows], committed), 0)
        bits = self.bits[:rows]
        choose(self.operations, self.limits, self.mass[:rows], lens.view(-1, 1, 1), bits, self.counts[:rows])
        return bits, lens


@dataclass(frozen=True)
class TargetStep:
    """One step of the target. The first `num_rows` rows of the batch, with `num_tokens` tokens, are short rows; the
    others are prompts."""

    capture: TargetCapture
    num_rows: int
    num_tokens: int
    max_query_len: int

    def attend(
        self,
        layer_name: str,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: SpecAttnMetadata,
        scale: float,
        out: torch.Tensor,
    ) -> bool:
        """Attend in one layer and store its scores. Returns False, and does nothing, for a layer that is not captured.
        `batch`: the step's metadata; query and out [T, Hq, D] without padding."""
        capture, md = self.capture, batch
        layer = capture.layer_sources.get(layer_name)
        if layer is None:
            return False
        if self.num_rows:
            self._attend_short(query, kv_cache, md, scale, out)
        if self.num_rows < md.num_reqs:
            self._attend_prompts(query, kv_cache, md, scale, out)
        capture.record(layer, md.num_reqs)
        return True

    def _attend_short(
        self, query: torch.Tensor, kv_cache: torch.Tensor, md: SpecAttnMetadata, scale: float, out: torch.Tensor
    ) -> None:
        capture, short = self.capture, slice(0, self.num_rows)
        capture.operations.draft_attention(
            query[: self.num_tokens],
            kv_cache,
            md.block_table[short],
            md.seq_lens[short],
            md.query_start_loc[: self.num_rows + 1],
            scale,
            out[: self.num_tokens],
            scored_rows=capture.scored_rows[short],
            scores=capture.scores[short],
            lse=capture.lse[short],
            max_query_len=self.max_query_len,
        )

    def _attend_prompts(
        self, query: torch.Tensor, kv_cache: torch.Tensor, md: SpecAttnMetadata, scale: float, out: torch.Tensor
    ) -> None:
        capture, long = self.capture, slice(self.num_rows, md.num_reqs)
        rows = md.num_reqs - self.num_rows
        starts = md.query_start_loc[self.num_rows : md.num_reqs + 1]
        capture.operations.dense_attention(
            query[self.num_tokens :],
            kv_cache,
            md.block_table[long],
            md.seq_lens[long],
            starts - self.num_tokens if self.num_tokens else starts,
            scale,
            out[self.num_tokens :],
            md.max_query_len,
            md.max_seq_len,
        )
        # The scores of each prompt's last row need another pass over the keys, for this one row only.
        last = capture.alone[:rows, None].long().expand(-1, SCORED).contiguous()
        capture.operations.draft_attention(
            query[capture.scored_rows[long, -1]],
            kv_cache,
            md.block_table[long],
            md.seq_lens[long],
            capture.alone[: rows + 1],
            scale,
            None,
            scored_rows=last,
            scores=capture.scores[long],
            lse=capture.lse[long],
        )

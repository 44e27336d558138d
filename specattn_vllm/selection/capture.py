"""The draft model's attention over one round, and the selections that are made from it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.methods.by_draft import ByDraftOptions
from specattn_vllm.selection.choose import Limits
from specattn_vllm.selection.ranking import Ranking

if TYPE_CHECKING:
    from specattn_vllm.backend.metadata import SpecAttnMetadata

# Up to this many query rows per request, one kernel both attends in a draft layer and stores the scores. Requests with
# more rows are prompts: another kernel attends, and this module makes only the scores of the sampled row.
MAX_FUSED_QUERY = 16


def dtype_of_scores(device: torch.device) -> torch.dtype:
    """bfloat16 scores are precise enough: their rounding changes a mass by less than a hundredth. On a CPU they are
    float32. device: the one on which they are computed, also where buffers are only measured, without memory."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class DraftCapture:
    """Collects the draft model's attention mass during a round, then turns it into bitmasks.

    One instance lives as long as the engine. A round is `begin_round`; then, for each draft step, `begin_step`, one
    `attend` per captured layer and `end_step`; then `select`. The host never waits for the device and buffers keep
    their addresses, so a round with a fixed number of rows can be captured in a CUDA graph.

    The mass of a layer is its softmax attention averaged over query heads: over all query heads, for one vector per
    layer (Shah, arXiv 2510.27641, s.3), or over the query heads of each KV head, for one vector per KV head (Xu et al.,
    arXiv 2605.15508). Only positions of the committed context are ranked. Newer positions are always read, so the
    selection needs no place for the K draft tokens.
    """

    def __init__(
        self,
        options: ByDraftOptions,
        operations: Operations,
        *,
        layer_sources: dict[str, int],
        num_heads: int,
        num_steps: int,
        max_num_reqs: int,
        max_model_len: int,
        device: torch.device,
        score_dtype: torch.dtype,
        groups: int = 1,
    ) -> None:
        """`layer_sources`: vLLM's name of each captured draft layer -> its index. `score_dtype`: of `dtype_of_scores`.
        `groups`: score groups per layer, 1 or the number of the draft model's KV heads."""
        self.limits = Limits.of(options)
        self.union = options.combine == "union"
        self.operations = operations
        self.layer_sources = layer_sources
        # With this weight each row of mass sums to at most 1, as the fixed-point top-p requires.
        self.weight = groups / (num_heads * (1 if self.union else num_steps))
        self.scores = torch.empty((max_num_reqs, num_heads, max_model_len), dtype=score_dtype, device=device)
        self.lse = torch.empty((max_num_reqs, num_heads), dtype=torch.float32, device=device)
        self.ranking = Ranking(len(layer_sources), groups, max_num_reqs, max_model_len, device)
        self._rows = torch.arange(max_num_reqs, device=device)
        self._starts = torch.arange(max_num_reqs + 1, dtype=torch.int32, device=device)
        self.step = -1
        self.clock: AbstractContextManager[None] = nullcontext()
        """Measures the selections from the mass."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(part.nbytes for part in (self.scores, self.lse, self._rows, self._starts, self.ranking))

    def begin_round(self, wanted: torch.Tensor) -> None:
        """Start a round of R rows. wanted [R] bool: rows whose next step is a verification."""
        self.num_reqs = wanted.shape[0]
        self.wanted = wanted
        self.step = -1
        self.ranking.begin(self.num_reqs)

    def begin_step(self, step: int, query_rows: torch.Tensor | None, row_lens: torch.Tensor | None) -> None:
        """Announce a draft step.

        query_rows [R] int64: for each request, the row of the batch's query from which a token is sampled; None if each
        request has one row. row_lens [R]: number of keys that this row attends to; given at step 0 only. It fixes the
        context length of the round, because the sampled row's token is the first that verification will recompute.
        """
        self.step = step
        self.query_rows = self._rows[: self.num_reqs] if query_rows is None else query_rows
        self.scored_rows = torch.where(self.wanted, self.query_rows, -1)[:, None]
        if step == 0:
            self.row_lens = torch.where(self.wanted, row_lens, 0).to(torch.int32)
            self.prefix_lens = (self.row_lens - 1).clamp_(min=0)

    def attend(
        self,
        layer_name: str,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: SpecAttnMetadata,
        scale: float,
        out: torch.Tensor,
    ) -> bool:
        """Capture one layer of a step. Returns whether it also filled `out`."""
        layer = self.layer_sources.get(layer_name)
        if layer is None:
            return False
        rows = self.num_reqs
        fused = batch.max_query_len <= MAX_FUSED_QUERY
        scores, lse = self.scores[:rows], self.lse[:rows]
        if fused:
            self.operations.draft_attention(
                query,
                kv_cache,
                batch.block_table[:rows],
                batch.seq_lens[:rows],
                batch.query_start_loc[: rows + 1],
                scale,
                out,
                self.scored_rows,
                scores,
                lse,
                batch.max_query_len,
            )
        else:
            self.operations.draft_attention(
                query[self.query_rows],
                kv_cache,
                batch.block_table[:rows],
                self.row_lens,
                self._starts[: rows + 1],
                scale,
                None,
                torch.where(self.wanted, self._rows[:rows], -1)[:, None],
                scores,
                lse,
            )
        rule = "store" if self.step == 0 or self.union else "add"
        self.operations.accumulate_mass(scores, lse, self.prefix_lens, self.ranking.mass[layer], self.weight, rule)
        return fused

    def end_step(self) -> None:
        """Close a draft step. With combine = 'union', a selection is made after each step."""
        if self.union:
            self._choose(union=self.step > 0)

    def select(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The selections of the round for each source: bits [S, R, G, W], and prefix_lens [R] int32 (0 for rows that
        are not wanted). A round without draft steps selects nothing."""
        if self.step < 0:
            return self.ranking.bits.zero_(), torch.zeros_like(self.wanted, dtype=torch.int32)
        if not self.union:
            self._choose(union=False)
        return self.ranking.bits, self.prefix_lens

    def _choose(self, *, union: bool) -> None:
        with self.clock:
            self.ranking.choose(self.operations, self.limits, self.prefix_lens, union=union)

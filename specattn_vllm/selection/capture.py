"""The draft's attention over one round, and the selection made from it."""

from __future__ import annotations

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions


class DraftCapture:
    """Collects the draft's attention mass while it drafts, then turns it into bitmasks.

    One instance lives as long as the engine; a round is `begin_round`, then for each draft step `begin_step`, one
    `attend` per captured layer and `end_step`, then `select`.

    The mass of a source layer is its softmax attention averaged over query heads: one vector per layer, shared by all
    heads (Shah, arXiv 2510.27641, s.3). Only positions of the committed context are ranked; what is newer is always
    read, so the K draft tokens need no place in the selection.
    """

    def __init__(
        self,
        options: SpecAttnOptions,
        operations: Operations,
        *,
        layer_sources: dict[str, int],
        num_heads: int,
        num_steps: int,
        max_num_reqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        """`layer_sources`: vLLM layer name of each captured draft layer -> its index 0..S-1."""
        self.options = options
        self.operations = operations
        self.layer_sources = layer_sources
        # Every row of mass sums to at most 1, which is what the fixed-point top-p needs.
        spread = num_steps if options.combine in ("sum", "max") else 1
        self.weight = 1.0 / (num_heads * spread)
        self.max_model_len = max_model_len
        self.groups = 1
        sources, words = len(layer_sources), -(-max_model_len // 32)
        self.scores = torch.empty((max_num_reqs, num_heads, max_model_len), dtype=torch.float32, device=device)
        self.lse = torch.empty((max_num_reqs, num_heads), dtype=torch.float32, device=device)
        # Flat, so that any number of rows is a contiguous [S, R, G, ...] block.
        self._mass = torch.empty(sources * max_num_reqs * self.groups * max_model_len, device=device)
        self._bits = torch.empty(sources * max_num_reqs * self.groups * words, dtype=torch.int32, device=device)
        self._counts = torch.empty(sources * max_num_reqs * self.groups, dtype=torch.int32, device=device)
        self.step = -1
        self.active = False

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.scores, self.lse, self._mass, self._bits, self._counts))

    def begin_round(self, num_reqs: int, wanted: torch.Tensor) -> None:
        """Start a round of `num_reqs` rows; wanted [R] bool marks the rows whose next step is a verification."""
        self.num_reqs = num_reqs
        self.wanted = wanted
        self.step = -1
        shape = (len(self.layer_sources), num_reqs, self.groups)
        rows = shape[0] * shape[1] * shape[2]
        words = -(-self.max_model_len // 32)
        self.mass = self._mass[: rows * self.max_model_len].view(*shape, self.max_model_len)
        self.bits = self._bits[: rows * words].view(*shape, words)
        self.counts = self._counts[:rows].view(*shape)

    def begin_step(self, step: int, query_rows: torch.Tensor | None, seq_lens: torch.Tensor) -> None:
        """Announce a draft step.

        query_rows [R] int64: row of the batch's query that is sampled for each request, None if row r is request r's
        only one. seq_lens [R]: keys that row attends. At step 0 they also fix the context length of the round: the
        sampled token is the first that verification will recompute.
        """
        self.step = step
        self.query_rows = query_rows
        self.seq_lens = torch.where(self.wanted, seq_lens, 0).to(torch.int32)
        if step == 0:
            self.prefix_lens = (self.seq_lens - 1).clamp_(min=0)
        self.active = step == 0 or self.options.combine != "first"

    def attend(
        self,
        layer_name: str,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> bool:
        """Capture one layer; returns whether `out` was filled (it is where every row is a sampled one)."""
        source = self.layer_sources.get(layer_name)
        if source is None or not self.active:
            return False
        every_row_sampled = self.query_rows is None
        rows = query if every_row_sampled else query[self.query_rows]
        scores, lse = self.scores[: self.num_reqs], self.lse[: self.num_reqs]
        # Rows that are not wanted have length 0 and get zeros: their request is still prefilling, so vLLM throws its
        # draft tokens away and rewrites their KV.
        self.operations.decode_attention(
            rows,
            kv_cache,
            block_table[: self.num_reqs],
            self.seq_lens,
            scale,
            out if every_row_sampled else None,
            scores,
            lse,
        )
        self.operations.accumulate_mass(
            scores, lse, self.prefix_lens, self.mass[source], self.weight, self._combine_rule()
        )
        return every_row_sampled

    def _combine_rule(self) -> str:
        if self.step == 0 or self.options.combine in ("union", "first"):
            return "store"
        return "add" if self.options.combine == "sum" else "max"

    def end_step(self) -> None:
        """Close a draft step: the union rule selects after each."""
        if self.active and self.options.combine == "union":
            self._select_top_p(union=self.step > 0)
        self.active = False

    def select(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The round's selection: bits [S, R, G, W] and prefix_lens [R] int32 (0 for rows that were not wanted).

        A round in which nothing was drafted selects nothing.
        """
        if self.step < 0:
            return self.bits.zero_(), torch.zeros_like(self.wanted, dtype=torch.int32)
        if self.options.combine != "union":
            self._select_top_p(union=False)
        return self.bits, self.prefix_lens

    def _select_top_p(self, *, union: bool) -> None:
        options = self.options
        rows = self.counts.numel()
        lens = self.prefix_lens.view(1, -1, 1).expand_as(self.counts).flatten().contiguous()
        self.operations.select_top_p(
            self.mass.view(rows, -1),
            lens,
            self.bits.view(rows, -1),
            self.counts.view(rows),
            options.top_p,
            options.min_tokens,
            -1 if options.max_tokens is None else options.max_tokens,
            options.max_fraction,
            options.sink_tokens,
            options.recent_tokens,
            union,
        )

"""The draft's attention over one round, and the selections made from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.methods.by_draft import ByDraftOptions
from specattn_vllm.selection.choose import Limits
from specattn_vllm.selection.draft_lists import DraftLists
from specattn_vllm.selection.induction import Induction
from specattn_vllm.selection.ranking import Ranking
from specattn_vllm.selection.shares import Choice, SharedOut

# Query rows per request up to which one kernel does a draft layer's attention and leaves the scores behind. Longer rows
# are prompts: another kernel attends, and only the sampled row's scores are made here.
MAX_FUSED_QUERY = 16


@dataclass(frozen=True)
class DraftBatch:
    """How the rows of a draft step lie: vLLM's metadata, as the operations take it."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int


class DraftCapture:
    """Collects the draft's attention mass while it drafts, then turns it into bitmasks.

    One instance lives as long as the engine; a round is `begin_round`, then for each draft step `begin_step`, one
    `attend` per captured layer and `end_step`, then `select`. Nothing waits for the device and every buffer lasts, so a
    round of a fixed number of rows can be captured in a CUDA graph.

    The mass of a layer is its softmax attention averaged over query heads: over all of them, one vector per layer
    (Shah, arXiv 2510.27641, s.3), or over those of each KV head, one vector per head (Xu et al., arXiv 2605.15508).
    Only positions of the committed context are ranked; what is newer is always read, so the K draft tokens need no
    place in the selection.

    A verification has a row more than the draft has steps, that of the bonus token. With `bonus_row` it has the mass of
    the last step, moved on by one position: heads that copy, whose choice is the hardest to foresee, move on so.

    With `sparse_draft`, every draft layer is captured at step 0, and later steps read what was chosen from that step's
    mass, averaged over all heads.
    """

    def __init__(
        self,
        options: ByDraftOptions,
        operations: Operations,
        *,
        layer_sources: dict[str, int],
        num_sources: int,
        num_heads: int,
        num_steps: int,
        max_num_reqs: int,
        max_model_len: int,
        device: torch.device,
        groups: int = 1,
        lists: DraftLists | None = None,
        choices: tuple[Choice, ...] = (),
    ) -> None:
        """`layer_sources`: vLLM layer name of each captured draft layer -> its index. The first `num_sources` choose
        for the target, in `groups` score groups: 1, or the draft's KV heads. `lists`: what the draft reads, with
        `sparse_draft`. `choices`: what each selection is, where layers have fractions of the context of their own;
        without, there is one for each source."""
        self.options = options
        self.limits, self.draft_limits = Limits.of(options), Limits.of_draft(options)
        self.operations = operations
        self.layer_sources = layer_sources
        self.num_sources = num_sources
        self.num_steps = num_steps
        # Every row of mass sums to at most 1, which is what the fixed-point top-p needs.
        spread = num_steps + options.counts_bonus_row if options.combine == "sum" else 1
        self.weight = groups / (num_heads * spread)
        layers = len(layer_sources)
        # Halving the scores costs a mass nothing: their rounding moves it by less than a hundredth.
        score_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.scores = torch.empty((max_num_reqs, num_heads, max_model_len), dtype=score_dtype, device=device)
        self.lse = torch.empty((max_num_reqs, num_heads), dtype=torch.float32, device=device)
        # Where all heads share a selection, one ranking serves the target and the draft's own later steps.
        shared = groups == 1
        self.ranked = layers if shared else num_sources
        copied = sorted({choice.source for choice in choices if choice.induction})
        self.ranking = Ranking(self.ranked + len(copied), groups, max_num_reqs, max_model_len, device)
        self.own_ranking = self.ranking
        if lists is not None and not shared:
            self.own_ranking = Ranking(layers, 1, max_num_reqs, max_model_len, device)
        self.lists = lists
        size = {"max_num_reqs": max_num_reqs, "max_model_len": max_model_len, "device": device}
        self.shared_out = self.induction = None
        if choices:
            # Rows of mass with followers stand behind those of the layers.
            fractions = []
            for choice in choices:
                if choice.fraction is None:
                    raise ValueError(f"{choice} without a fraction, beside choices that have one")
                row = self.ranked + copied.index(choice.source) if choice.induction else choice.source
                fractions.append((row, choice.fraction))
            self.shared_out = SharedOut(options, tuple(fractions), groups=groups, **size)
        if copied:
            self.induction = Induction(operations, copied, num_steps=num_steps, **size)
        self._rows = torch.arange(max_num_reqs, device=device)
        self._starts = torch.arange(max_num_reqs + 1, dtype=torch.int32, device=device)
        self.step = -1

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, those of the lists included."""
        parts: set[Ranking | DraftLists | SharedOut | Induction] = {self.ranking, self.own_ranking}  # one, or two
        parts.update(part for part in (self.lists, self.shared_out, self.induction) if part is not None)
        return sum(part.nbytes for part in (self.scores, self.lse, self._rows, self._starts, *parts))

    def begin_round(self, num_reqs: int, wanted: torch.Tensor, slots: torch.Tensor, *, for_target: bool = True) -> None:
        """Start a round of `num_reqs` rows in slots [R] int64, -1 for nobody's; wanted [R] bool marks the rows whose
        next step is a verification. What is not `for_target` serves the draft's own lists alone, and ends without a
        `select`."""
        self.num_reqs = num_reqs
        self.wanted, self.slots, self.for_target = wanted, slots, for_target
        self.step = -1
        self.ranking.begin(num_reqs)
        self.own_ranking.begin(num_reqs)

    def begin_step(self, step: int, query_rows: torch.Tensor | None, row_lens: torch.Tensor | None) -> None:
        """Announce a draft step.

        query_rows [R] int64: row of the batch's query that is sampled for each request, None if row r is request r's
        only one. row_lens [R]: keys that row attends, at step 0, where they fix the context length of the round: the
        sampled token is the first that verification will recompute.
        """
        self.step = step
        self.query_rows = self._rows[: self.num_reqs] if query_rows is None else query_rows
        self.scored_rows = torch.where(self.wanted, self.query_rows, -1)[:, None]
        if step == 0:
            self.row_lens = torch.where(self.wanted, row_lens, 0).to(torch.int32)
            self.prefix_lens = (self.row_lens - 1).clamp_(min=0)
            if self.lists is not None:
                self.lists.begin(self.row_lens)

    def attend(
        self,
        layer_name: str,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: DraftBatch,
        scale: float,
        out: torch.Tensor,
    ) -> bool:
        """Capture one layer of a step; returns whether `out` was filled too."""
        layer = self.layer_sources.get(layer_name)
        if layer is None:
            return False
        later = self.for_target and layer < self.num_sources
        scoring = self.step == 0 or later
        reads = self.lists.of(layer) if self.lists is not None and self.step > 0 else {}
        fused = batch.max_query_len <= MAX_FUSED_QUERY
        scores, lse = self.scores[: self.num_reqs], self.lse[: self.num_reqs]
        captured = {"scored_rows": self.scored_rows, "scores": scores, "lse": lse} if scoring else {}
        if fused:
            self.operations.draft_attention(
                query,
                kv_cache,
                batch.block_table[: self.num_reqs],
                batch.seq_lens[: self.num_reqs],
                batch.query_start_loc[: self.num_reqs + 1],
                scale,
                out,
                **captured,
                max_query_len=batch.max_query_len,
                **reads,
                **({"prefix_lens": self.prefix_lens} if reads else {}),
            )
        else:
            captured["scored_rows"] = torch.where(self.wanted, self._rows[: self.num_reqs], -1)[:, None]
            self.operations.draft_attention(
                query[self.query_rows],
                kv_cache,
                batch.block_table[: self.num_reqs],
                self.row_lens,
                self._starts[: self.num_reqs + 1],
                scale,
                None,
                **captured,
            )
        if scoring:
            self._accumulate(layer, reads)
        return fused

    def _accumulate(self, layer: int, reads: dict[str, torch.Tensor]) -> None:
        """Mass of a layer from the scores that it just left."""
        if self.step == 0 and self.own_ranking is not self.ranking:
            weight = self.weight / self.ranking.groups
            self._add_mass(self.own_ranking.mass[layer], weight, "store", reads)
        if layer >= self.ranked or not (self.for_target or self.own_ranking is self.ranking):
            return
        rule = "store" if self.step == 0 or self.options.combine == "union" else "add"
        self._add_mass(self.ranking.mass[layer], self.weight, rule, reads)
        if self.options.counts_bonus_row and self.step == self.num_steps - 1 and layer < self.num_sources:
            self._add_mass(self.ranking.mass[layer], self.weight, "add", reads, shift=1)

    def _add_mass(
        self, mass: torch.Tensor, weight: float, rule: str, reads: dict[str, torch.Tensor], *, shift: int = 0
    ) -> None:
        if reads and rule == "store":
            # What a step by lists does not read has no mass in it.
            mass.zero_()
            rule = "add"
        scores, lse = self.scores[: self.num_reqs], self.lse[: self.num_reqs]
        self.operations.accumulate_mass(scores, lse, self.prefix_lens, mass, weight, rule, **reads, shift=shift)

    def end_step(self) -> None:
        """Close a draft step: the union rule selects after each, and `sparse_draft` after the first."""
        if self.step == 0 and self.lists is not None:
            own = self.own_ranking
            own.choose(self.operations, self.draft_limits, self.prefix_lens, len(self.layer_sources))
            self.lists.choose(own.bits[: len(self.layer_sources)], self.num_steps)
            if own is self.ranking and self.shared_out is None and self.draft_limits == self.limits:
                return  # what a union begins with is chosen already
        if self.for_target and self.options.combine == "union":
            self._choose(union=self.step > 0)

    def select(self, drafts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The round's selections for the target, of each source or of each choice: bits [T, R, G, W], and prefix_lens
        [R] int32 (0 for unwanted rows).

        drafts [R, K] int64, for layers that copy. A round in which nothing was drafted selects nothing.
        """
        bits = self.ranking.bits[: self.num_sources]
        if self.shared_out is not None:
            bits = self.shared_out.bits(self.num_reqs)
        if self.step < 0:
            return bits.zero_(), torch.zeros_like(self.wanted, dtype=torch.int32)
        if self.induction is not None:
            mass = self.ranking.mass
            self.induction.add(mass[: self.ranked], mass[self.ranked :], self.slots, self.prefix_lens, drafts)
        if self.options.combine != "union":
            self._choose(union=False)
        return bits, self.prefix_lens

    def _choose(self, *, union: bool) -> None:
        if self.shared_out is not None:
            self.shared_out.choose(self.operations, self.ranking.mass, self.prefix_lens, union=union)
            return
        self.ranking.choose(self.operations, self.limits, self.prefix_lens, self.num_sources, union=union)

"""Method 'fused': how much each KV head of the target reads is decided by its own attention, and what, by the draft's.

How far down the draft's choice one has to go for most of the target's attention differs between layers and heads, by
how widely they attend and by how well the draft foresees it. A verification that reads a selection sees only what it
kept, so this is counted whenever a row reads everything: in a request's first ones and in each `refresh_every`-th. One
count says little, since a head may attend to few tokens at one time and to many at another: sizes are means.

With `history_weight`, what the target attended to then is also added to what the draft attends to (`History`).
"""

from __future__ import annotations

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.choose import Limits, choose, mass_rows
from specattn_vllm.selection.history import History
from specattn_vllm.selection.pruner import TableMaps
from specattn_vllm.selection.ranking import Ranking
from specattn_vllm.selection.target_capture import TargetCapture, TargetStep

PRIOR = 2
"""Counts that `ratio` is worth: a request's size begins there, and its own counts outweigh it soon. With one or two of
them, this is better than their mean alone; 2 and 4 hardly differ (demo pair, 4k of context)."""


class Sizes:
    """Sizes by request slot, and the selections of that size.

    In the target's step `begin` marks the rows that read everything, whose scores `TargetStep.watch` keeps; after it
    `learn` counts, and when the round is drafted `select` chooses. Nothing waits for the device and every buffer lasts,
    so verification and drafting can be captured in CUDA graphs, each by itself.

    shares  [num_slots + 1, T, H] float32: for each target layer that reads a selection and each of its KV heads, the
            share of the context that had to be kept, by the draft's choice, for `size_top_p` of the layer's attention;
            summed over the verifications in which the request read everything.
    counts  [num_slots + 1] int32: how many these are.
    drafted [num_slots + 1, 3] int64: where the draft's attention of the last round stands, as row, rows of that round,
            and tokens that are ranked, 0: nowhere.

    The last slot is nobody's, as in `SelectionStore`.
    """

    @classmethod
    def of(
        cls, options: SpecAttnOptions, operations: Operations, maps: TableMaps, *, max_num_reqs: int, **shape
    ) -> Sizes:
        """With a capture of the target's layers. `shape`: what `TargetCapture` is told besides, but for what follows
        from the maps."""
        limits, groups = Limits.of_budgets(options), maps.groups.shape[1]
        target = TargetCapture(operations, limits, groups=groups, max_num_reqs=max_num_reqs, dilation=0, **shape)
        return cls(options, target, maps, max_num_reqs)

    def __init__(self, options: SpecAttnOptions, target: TargetCapture, maps: TableMaps, slots: int) -> None:
        """target: its layers in the order of the tables. maps: for each of them, the draft layer and KV heads that
        choose."""
        self.limits = target.limits
        self.options = options
        self.target = target
        self.maps = maps
        device = target.mass.device
        self.shares = torch.zeros((slots + 1, *maps.groups.shape), dtype=torch.float32, device=device)
        self.counts = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self.drafted = torch.zeros((slots + 1, 3), dtype=torch.int64, device=device)
        self._made_from = maps.sources.long(), maps.groups.long()
        self.history = None
        if options.history_weight:
            self.history = History(
                target.operations,
                layers=maps.groups.shape[0],
                slots=slots,
                max_model_len=target.mass.shape[3],
                weight=options.history_weight,
                dilation=options.dilation_or_default(target.max_query_len - 1),
                device=device,
            )
        self._rows = torch.arange(slots, device=device)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by what they hold, those of the target's capture included, the maps not."""
        target = self.target
        own = (self.shares, self.counts, self.drafted, self._rows)
        return {
            "scores": target.scores.nbytes,
            "mass": sum(t.nbytes for t in (target.mass, target.lse, target.scored_rows, target.lens, target.alone)),
            "bitmasks": sum(t.nbytes for t in (target.bits, target.counts, *own)),
            "history": 0 if self.history is None else self.history.nbytes,
        }

    def begin(
        self,
        slots: torch.Tensor,
        prefilling: torch.Tensor,
        reads_everything: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        rows: int,
    ) -> None:
        """Announce a step of the target, in which the first `rows` rows verify or have as few tokens.

        slots [R] int64, -1 for rows that only fill a graph's batch; prefilling and reads_everything [R] bool;
        query_start_loc [R+1] and seq_lens [R] int32. A row that prefills belongs to a request that is new or resumed,
        and clears its slot.
        """
        begun = torch.where(prefilling, slots, -1)
        for kept in (self.shares, self.counts, self.drafted):
            kept.index_fill_(0, begun, 0)
        if self.history is not None:
            self.history.forget(begun)
        watched = (reads_everything & ~prefilling & (slots >= 0))[:rows]
        self.target.mark(query_start_loc[: rows + 1], torch.where(watched, seq_lens[:rows], 0))

    def watch(self, rows: int, tokens: int, max_query_len: int) -> TargetStep:
        """The step that was begun, for the layers to leave their scores in."""
        return TargetStep(self.target, rows, tokens, max_query_len)

    def learn(self, slots: torch.Tensor, ranking: Ranking) -> None:
        """Count for the rows that read everything in the target's last step, whose rows had slots [R] int64.

        ranking: still with the mass of the round that drafted what this step verified. Rows that were in no such round
        teach nothing.
        """
        target, options, num_reqs = self.target, self.options, slots.shape[0]
        row, rows, length = self.drafted[slots].unbind(1)
        # The verification's first token is the first that the draft did not rank.
        counted = (length > 0) & (target.lens[:num_reqs] == length + 1)
        lens = torch.where(counted, length, 0).int()
        counts = target.counts[:num_reqs]
        target.operations.count_ranked(
            target.mass[:num_reqs].view(-1, target.mass.shape[3]),
            ranking.rows,
            lens.view(-1, 1, 1).expand_as(counts).flatten().contiguous(),
            counts.view(-1),
            options.size_top_p,
            options.sink_tokens,
            options.recent_tokens,
            mass_rows(*self._made_from, row, ranking.groups, rows).transpose(0, 1).flatten(),
        )
        self.shares[slots] += counts / lens.clamp(min=1).view(-1, 1, 1)
        self.counts[slots] += counted.int()
        if self.history is not None:
            self.history.keep(target.mass[:num_reqs], slots, target.lens[:num_reqs])

    def select(self, mass: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose for the rows that have read everything often enough.

        mass [S, R, G, L] float32 of the draft's sources and KV heads; slots [R] int64; lens [R] int32, tokens that are
        ranked. Returns bits [T, R, H, W] int32 and lens, 0 where nothing is chosen; the bits stand until the target's
        next step.
        """
        _, num_reqs, groups, width = mass.shape
        row = self._rows[:num_reqs]
        self.drafted[slots] = torch.stack((row, torch.full_like(row, num_reqs), lens.long()), 1)
        counts = self.counts[slots]
        lens = torch.where(counts >= self.options.size_rounds, lens, 0)
        # Exact for any size; rounded up, as the share of a context is.
        share = self.shares[slots].double() + PRIOR * self.options.ratio_or_default
        share /= (counts + PRIOR).view(-1, 1, 1)
        if self.options.fixed_budget:
            share.fill_(self.options.ratio_or_default)
        wanted = (share * self.options.size_factor * lens.view(-1, 1, 1)).ceil_().clamp_(max=width).int()
        ranks = mass_rows(*self._made_from, row, groups)
        shape = ranks.shape
        # What the target's step left has been counted, so its buffers may serve here.
        if self.history is not None:
            both = self.target.mass[:num_reqs].view(*shape, width)
            self.history.add(mass.view(-1, width), ranks, slots, lens, both)
            mass, ranks = both, None
        choose(
            self.target.operations,
            self.limits,
            mass,
            lens.view(1, -1, 1),
            bits := self.target.bits[:num_reqs].view(*shape, self.target.bits.shape[3]),
            self.target.counts[:num_reqs].view(*shape),
            budgets=wanted.transpose(0, 1).contiguous(),
            mass_rows=ranks,
        )
        return bits, lens

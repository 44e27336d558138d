"""Method 'fused': how much each KV head of the target reads is decided by its own attention, and what, by the draft's.

How many tokens hold most of the attention differs between layers and heads, and the draft's counts do not carry over to
the target; which tokens they are, the draft sees ahead. A verification that reads a selection sees only what it kept,
so counts are taken whenever a row reads everything, as in a request's first verification and every `refresh_every`-th,
and hold until the next.
"""

from __future__ import annotations

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.selection.choose import Limits, choose, mass_rows
from specattn_vllm.selection.pruner import TableMaps
from specattn_vllm.selection.target_capture import TargetCapture, TargetStep


class Sizes:
    """Sizes by request slot, and the selections of that size.

    In the target's step `begin` marks the rows that read everything, whose scores `TargetStep.watch` keeps; after it
    `learn` counts, and when the round is drafted `select` chooses. Nothing waits for the device and every buffer lasts,
    so verification and drafting can be captured in CUDA graphs, each by itself.

    sizes [num_slots + 1, T, H] int32: for each target layer that reads a selection and each of its KV heads, the tokens
    that held `size_top_p` of its attention mass when the request last read everything; 0 where it has not yet. The last
    slot is nobody's, as in `SelectionStore`.
    """

    @classmethod
    def of(
        cls, options: SpecAttnOptions, operations: Operations, maps: TableMaps, *, max_num_reqs: int, **shape
    ) -> Sizes:
        """With a capture of the target's layers. `shape`: what `TargetCapture` is told besides, but for what follows
        from the maps."""
        limits, groups = Limits.of_sizes(options), maps.groups.shape[1]
        target = TargetCapture(operations, limits, groups=groups, max_num_reqs=max_num_reqs, dilation=0, **shape)
        return cls(options, target, maps, max_num_reqs)

    def __init__(self, options: SpecAttnOptions, target: TargetCapture, maps: TableMaps, slots: int) -> None:
        """target: made with `Limits.of_sizes`, its layers in the order of the tables. maps: for each of them, the draft
        layer and KV heads that choose."""
        self.limits = Limits.of_budgets(options)
        self.factor = options.size_factor
        self.target = target
        self.maps = maps
        device = target.mass.device
        self.sizes = torch.zeros((slots + 1, *maps.groups.shape), dtype=torch.int32, device=device)
        self._rows = torch.arange(slots, device=device)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by what they hold, those of the target's capture included, the maps not."""
        target = self.target
        return {
            "scores": target.scores.nbytes,
            "mass": sum(t.nbytes for t in (target.mass, target.lse, target.scored_rows, target.lens, target.alone)),
            "bitmasks": sum(t.nbytes for t in (target.bits, target.counts, self.sizes, self._rows)),
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
        self.sizes[torch.where(prefilling, slots, -1)] = 0
        watched = (reads_everything & ~prefilling & (slots >= 0))[:rows]
        self.target.mark(query_start_loc[: rows + 1], torch.where(watched, seq_lens[:rows], 0))

    def watch(self, rows: int, tokens: int, max_query_len: int) -> TargetStep:
        """The step that was begun, for the layers to leave their scores in."""
        return TargetStep(self.target, rows, tokens, max_query_len)

    def learn(self, slots: torch.Tensor) -> None:
        """Take the sizes of the rows that read everything in the target's last step, whose rows had slots [R] int64."""
        counts, lens = self.target.count(slots.shape[0])
        # Attention to the newest tokens alone would count none, which would pass for a size that is not known.
        seen = (lens > 0).view(-1, 1, 1)
        self.sizes[slots] = torch.where(seen, counts.clamp(min=1), self.sizes[slots])

    def select(self, mass: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose for the rows whose sizes are known.

        mass [S, R, G, L] float32 of the draft's sources and KV heads; slots [R] int64; lens [R] int32, tokens that are
        ranked. Returns bits [T, R, H, W] int32 and lens, 0 where nothing is chosen; the bits stand until the target's
        next step.
        """
        sizes = self.sizes[slots]
        lens = torch.where(sizes[:, 0, 0] > 0, lens, 0)
        # Exact for any size; rounded up, as the share of a context is.
        wanted = (sizes.double() * self.factor).ceil_().clamp_(max=mass.shape[3]).int()
        sources, heads = self.maps.sources.long(), self.maps.groups.long()
        rows = mass_rows(sources, heads, self._rows[: mass.shape[1]], mass.shape[2])
        tables, num_reqs, heads = rows.shape
        # What the target's step left has been counted, so its buffers may serve here.
        counts = self.target.counts[:num_reqs].view(tables, num_reqs, heads)
        bits = self.target.bits[:num_reqs].view(tables, num_reqs, heads, self.target.bits.shape[3])
        choose(
            self.target.operations,
            self.limits,
            mass,
            lens.view(1, -1, 1),
            bits,
            counts,
            budgets=wanted.transpose(0, 1).contiguous(),
            mass_rows=rows,
        )
        return bits, lens

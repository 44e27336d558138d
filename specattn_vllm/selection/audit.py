"""How much of the target's attention its pruned steps hold, measured on a share of them.

For a row of one layer, with s the softmax weight that the selection holds under full attention, and o the two outputs,

    s = exp(lse_selected - lse_full)        |o_full - o_selected| <= 2 (1 - s) max |v|

because o_full is s times o_selected and (1 - s) times a mean of other values. A share of a draft's attention, or of
what a sketch estimates, bounds neither: s has to be measured. lse_selected comes with the attention over the selection;
lse_full takes one more pass over the keys, which only the audited pairs of (layer, request) pay for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.selection.audit_report import BINS, AuditTotals
from specattn_vllm.stats import Counters

if TYPE_CHECKING:
    from specattn_vllm.backend.metadata import SpecAttnMetadata

# Odd factors of a multiplicative hash, below 2^63; any would do whose bits look random.
_BY_LAYER, _BY_SLOT, _BY_LENGTH, _MIX = 0x5851F42D4C957F2D, 0x369DEA0F31A53F85, 0x27BB2EE687B0B0FD, 0x106689D45497FDB5
_HASH_BITS = 31


class Audit:
    """Which (layer, request) pairs of a step are audited, what was measured in them, and the totals of that.

    Per step: `choose` outside of any graph, one `observe` of each layer (`LayerAudit`), then `fold`. Only `observe`
    runs in CUDA graphs, on buffers that last: each replay audits the pairs chosen for its own step. Nothing waits for
    the device but `read`.

    A layers, R requests, Hq query heads, H KV heads of this rank:

    scored_rows             [A, max_num_reqs, 1] int64: the first query row of an audited pair, -1 of any other
    requests                [A, `at_most(max_num_reqs)`] int64: the audited rows of each layer, -1 behind them
    lse_selected, lse_full  [A, max_num_reqs, Hq] float32: of that row; of other pairs undefined
    largest_values          [A, H] float32: the largest norm of a value written so far
    """

    def __init__(
        self,
        operations: Operations,
        counters: Counters,
        *,
        layers: list[str],
        num_heads: int,
        num_kv_heads: int,
        max_num_reqs: int,
        share: float,
        device: torch.device,
    ) -> None:
        """layers: names of the target layers that read a selection. share: of their pairs with a request that reads
        one, 0 to 1."""
        self.operations = operations
        self.counters = counters
        self.layers = layers
        self.num_heads = num_heads
        self.share = share
        self.device = device
        a = len(layers)
        self.scored_rows = torch.full((a, max_num_reqs, 1), -1, dtype=torch.int64, device=device)
        self.requests = torch.full((a, self.at_most(max_num_reqs)), -1, dtype=torch.int64, device=device)
        self.lse_selected = torch.zeros((a, max_num_reqs, num_heads), dtype=torch.float32, device=device)
        self.lse_full = torch.zeros_like(self.lse_selected)
        self.largest_values = torch.zeros((a, num_kv_heads), dtype=torch.float32, device=device)
        self._first_rows = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self._layer = torch.arange(a, device=device)
        self._rows = 0
        """Rows from which the last step's pairs were chosen."""
        self._histogram = torch.zeros((a, BINS), dtype=torch.int64, device=device)
        self._pairs = torch.zeros(a, dtype=torch.int64, device=device)
        self._retained = torch.zeros(a, dtype=torch.float64, device=device)
        self._bound = torch.zeros(a, dtype=torch.float64, device=device)
        self._largest_bound = torch.zeros(a, dtype=torch.float32, device=device)
        self._reported = self.read()

    def of_layer(self, name: str) -> LayerAudit:
        """What the attention of one layer is given."""
        return LayerAudit(self, self.layers.index(name))

    def at_most(self, rows: int) -> int:
        """Rows of so many that may be audited in one layer of a step."""
        return math.ceil(self.share * rows)

    def choose(self, slots: torch.Tensor, usable: torch.Tensor, starts: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Choose the pairs of a step whose first R rows may read a selection.

        slots [R] int64; usable [R] int32, negative for a row that reads everything; starts [R] int32, each row's first
        token in the batch; seq_lens [R] int32. By a hash of layer, slot and length: another length is another choice.

        Of n rows that read a selection a layer audits `share` times n, rounded up as often as makes that the mean, and
        so each row as often as the share says, but never more than `at_most`: the programs of a captured graph cannot
        wait to see how many there are.
        """
        rows, sparse = slots.shape[0], usable >= 0
        layer = self._layer * _BY_LAYER
        drawn = _drawn(layer[:, None] + (slots * _BY_SLOT + seq_lens * _BY_LENGTH))
        wanted = self.share * sparse.sum().double()
        # One more than the whole part where the draw of layer and step is below the rest.
        step = torch.where(sparse, slots * _BY_SLOT ^ seq_lens * _BY_LENGTH, 0).sum()
        wanted = (wanted + _drawn(layer + step).double() / 2**_HASH_BITS).floor()
        order = torch.where(sparse, drawn, 2**_HASH_BITS).topk(self.at_most(rows), largest=False).indices
        chosen = torch.arange(order.shape[1], device=self.device) < wanted[:, None]
        self.requests.fill_(-1)
        self.requests[:, : order.shape[1]] = torch.where(chosen, order, -1)
        self.scored_rows.fill_(-1)
        self.scored_rows[:, :rows, 0].scatter_(1, order, torch.where(chosen, starts[order].long(), -1))
        # A row that only fills a batch may start behind its last token.
        self._first_rows[:rows] = torch.where(sparse, starts, 0)
        self._rows = rows

    def fold(self) -> None:
        """Add what the step's layers measured to the totals; nothing where no rows were chosen from."""
        if not self._rows:
            return
        rows, self._rows = self._rows, 0
        audited = self.scored_rows[:, :rows, 0] >= 0
        by_head = audited[..., None].expand(-1, -1, self.num_heads)
        retained = (self.lse_selected[:, :rows] - self.lse_full[:, :rows]).exp().clamp_(max=1.0)
        # What was not measured is undefined, and undefined times zero need not be zero.
        retained = torch.where(by_head, retained, 1.0)
        lost = 1.0 - retained
        largest = self.largest_values.repeat_interleave(self.num_heads // self.largest_values.shape[1], dim=1)
        bound = 2.0 * lost * largest[:, None]
        # Narrow bins where s is near 1: see `audit_report`.
        bins = ((1.0 - lost.sqrt()) * BINS).long().clamp_(max=BINS - 1) + self._layer[:, None, None] * BINS
        self._histogram.view(-1).scatter_add_(0, bins.flatten(), by_head.long().flatten())
        pairs = audited.sum(1)
        self._pairs += pairs
        self._retained += torch.where(by_head, retained, 0.0).sum((1, 2), dtype=torch.float64)
        self._bound += bound.sum((1, 2), dtype=torch.float64)
        torch.maximum(self._largest_bound, bound.flatten(1).amax(1), out=self._largest_bound)
        self.counters.add(audited_pairs=pairs.sum())

    def discard(self) -> None:
        """Forget what was chosen: the step was run to warm up."""
        self._rows = 0

    def reset(self) -> None:
        """Start again from zero."""
        self.discard()
        for total in (self._histogram, self._pairs, self._retained, self._bound, self._largest_bound):
            total.zero_()
        self.largest_values.zero_()
        self._reported = self.read()

    def read(self) -> AuditTotals:
        """Totals up to now; waits for the device."""
        # Copies, on a CPU too: the totals go on.
        tensors = (self._histogram, self._pairs, self._retained, self._bound, self._largest_bound)
        return AuditTotals(tuple(self.layers), self.num_heads, *(t.to("cpu", copy=True) for t in tensors))

    def totals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all layers, on the device: samples by retained mass [BINS] int64, and the sum of their mass. Does not
        wait."""
        return self._histogram.sum(0), self._retained.sum()

    def line(self) -> str | None:
        """The log line for what was audited since it was last asked for; None if nothing was. Waits for the device."""
        totals = self.read()
        new, self._reported = totals.since(self._reported), totals
        return new.line()


def _drawn(x: torch.Tensor) -> torch.Tensor:
    """Hash of int64 numbers, below 2^_HASH_BITS."""
    # The shifts are arithmetic; what they bring in is as good as any bits.
    x = (x ^ (x >> 32)) * _MIX
    x = (x ^ (x >> 29)) * _BY_LAYER
    return (x >> 32) & (2**_HASH_BITS - 1)


class LayerAudit:
    """One layer's part of an audit; everything here may run under CUDA graph capture."""

    def __init__(self, audit: Audit, index: int) -> None:
        self._audit = audit
        self._index = index

    def note_values(self, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Values [T or more, H, D] go to the cache's slot_mapping [T] int64; those of negative slots nowhere."""
        tokens = slot_mapping.shape[0]
        if tokens == 0:
            return
        norms = torch.linalg.vector_norm(value[:tokens], dim=-1, dtype=torch.float32)
        norms.masked_fill_((slot_mapping < 0)[:, None], 0.0)
        largest = self._audit.largest_values[self._index]
        torch.maximum(largest, norms.amax(0), out=largest)

    def observe(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        md: SpecAttnMetadata,
        rows: int,
        scale: float,
        lse: torch.Tensor,
    ) -> None:
        """Measure the pairs that were chosen; query [T, Hq, D] and lse [T, Hq] are those of the step's first `rows`
        rows, which may read a selection."""
        audit, i = self._audit, self._index
        audit.operations.draft_attention(
            query,
            kv_cache,
            md.block_table[:rows],
            md.seq_lens[:rows],
            md.query_start_loc[: rows + 1],
            scale,
            None,
            audit.scored_rows[i, :rows],
            None,
            audit.lse_full[i, :rows],
            requests=audit.requests[i, : audit.at_most(rows)],
        )
        torch.index_select(lse, 0, audit._first_rows[:rows], out=audit.lse_selected[i, :rows])

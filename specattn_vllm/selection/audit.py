"""Measures how much of the target's attention mass its selections hold, on a share of all selections.

For one row of one layer: s is the softmax weight that the selection holds under dense attention; o_full and o_selected
are the outputs of dense attention and of attention over the selection. Then

    s = exp(lse_selected - lse_full)        |o_full - o_selected| <= 2 (1 - s) max |v|

because o_full is the sum of s times o_selected and (1 - s) times a mean of other values. The mass of a draft model's
attention, or of a sketch's estimate, is no bound for s or for the error, so s has to be measured. lse_selected comes
with the attention over the selection. lse_full costs one more pass over the keys, only for the audited (layer, request)
pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.selection.audit_report import BINS, AuditTotals
from specattn_vllm.stats import Counters

if TYPE_CHECKING:
    from specattn_vllm.backend.metadata import SpecAttnMetadata

# Odd factors of a multiplicative hash, below 2^63. Any factors whose bits look random would do.
_BY_LAYER, _BY_SLOT, _BY_LENGTH, _MIX = 0x5851F42D4C957F2D, 0x369DEA0F31A53F85, 0x27BB2EE687B0B0FD, 0x106689D45497FDB5
_HASH_BITS = 31


class Audit:
    """Chooses the (layer, request) pairs of each step that are audited, and keeps their measurements and the totals.

    Order of calls in a step: `choose` outside of any CUDA graph, `LayerAudit.observe` in each layer, then `fold`. Only
    `observe` runs in CUDA graphs. It uses permanent buffers, so a replay audits the pairs chosen for its own step. Only
    `read` waits for the device.

    A layers, R requests, Hq query heads, H KV heads of this rank:

    scored_rows             [A, max_num_reqs, 1] int64: the first query row of each audited pair, -1 for other pairs
    requests                [A, `at_most(max_num_reqs)`] int64: the audited rows of each layer, followed by -1
    lse_selected, lse_full  [A, max_num_reqs, Hq] float32: for the scored row; undefined for pairs that are not audited
    largest_values          [A, H] float32: the largest norm of all values written so far
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
        """layers: names of the target layers that read a selection. share: share of the (layer, request) pairs with a
        selection that is audited, 0 to 1."""
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
        """Number of rows among which `choose` has chosen pairs that are not folded yet."""
        self._histogram = torch.zeros((a, BINS), dtype=torch.int64, device=device)
        self._pairs = torch.zeros(a, dtype=torch.int64, device=device)
        self._retained = torch.zeros(a, dtype=torch.float64, device=device)
        self._bound = torch.zeros(a, dtype=torch.float64, device=device)
        self._largest_bound = torch.zeros(a, dtype=torch.float32, device=device)
        self._reported = self.read()

    def of_layer(self, name: str) -> LayerAudit:
        """The part of this audit for one layer, by vLLM's layer name."""
        return LayerAudit(self, self.layers.index(name))

    def at_most(self, rows: int) -> int:
        """The most rows, out of `rows`, that are audited in one layer of a step."""
        return math.ceil(self.share * rows)

    def choose(self, slots: torch.Tensor, usable: torch.Tensor, starts: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Choose the pairs of a step whose first R rows may read a selection.

        slots [R] int64; usable [R] int32, negative for a dense row; starts [R] int32, each row's first token in the
        batch; seq_lens [R] int32. The choice is by a hash of layer, slot and length, so it changes with the length.

        If n rows read a selection, each layer audits `share` times n of them, rounded up or down at random so that this
        is the mean. No layer audits more than `at_most` rows: the size of a captured graph's launch is fixed before the
        number is known.
        """
        rows, sparse = slots.shape[0], usable >= 0
        layer = self._layer * _BY_LAYER
        drawn = _drawn(layer[:, None] + (slots * _BY_SLOT + seq_lens * _BY_LENGTH))
        wanted = self.share * sparse.sum().double()
        # Adds a random number in [0, 1), drawn for layer and step, and rounds down.
        step = torch.where(sparse, slots * _BY_SLOT ^ seq_lens * _BY_LENGTH, 0).sum()
        wanted = (wanted + _drawn(layer + step).double() / 2**_HASH_BITS).floor()
        order = torch.where(sparse, drawn, 2**_HASH_BITS).topk(self.at_most(rows), largest=False).indices
        chosen = torch.arange(order.shape[1], device=self.device) < wanted[:, None]
        self.requests.fill_(-1)
        self.requests[:, : order.shape[1]] = torch.where(chosen, order, -1)
        self.scored_rows.fill_(-1)
        self.scored_rows[:, :rows, 0].scatter_(1, order, torch.where(chosen, starts[order].long(), -1))
        # The start of a padded row may lie after the batch's last token.
        self._first_rows[:rows] = torch.where(sparse, starts, 0)
        self._rows = rows

    def fold(self) -> None:
        """Add the measurements of the last step to the totals. Does nothing without a `choose` since the last fold."""
        if not self._rows:
            return
        rows, self._rows = self._rows, 0
        audited = self.scored_rows[:, :rows, 0] >= 0
        by_head = audited[..., None].expand(-1, -1, self.num_heads)
        # A request whose keys are no numbers has lost everything, and totals stay numbers.
        retained = (self.lse_selected[:, :rows] - self.lse_full[:, :rows]).exp().nan_to_num_(0.0).clamp_(max=1.0)
        # Unmeasured elements are undefined. Multiplying by 0 would not remove a NaN.
        retained = torch.where(by_head, retained, 1.0)
        lost = 1.0 - retained
        largest = self.largest_values.repeat_interleave(self.num_heads // self.largest_values.shape[1], dim=1)
        bound = 2.0 * lost * largest[:, None]
        # The bins are narrow near s = 1: see `audit_report`.
        bins = ((1.0 - lost.sqrt()) * BINS).long().clamp_(max=BINS - 1) + self._layer[:, None, None] * BINS
        self._histogram.view(-1).scatter_add_(0, bins.flatten(), by_head.long().flatten())
        pairs = audited.sum(1)
        self._pairs += pairs
        self._retained += torch.where(by_head, retained, 0.0).sum((1, 2), dtype=torch.float64)
        self._bound += bound.sum((1, 2), dtype=torch.float64)
        torch.maximum(self._largest_bound, bound.flatten(1).amax(1), out=self._largest_bound)
        self.counters.add(audited_pairs=pairs.sum())

    def discard(self) -> None:
        """Forget the chosen pairs: the step was a warm-up."""
        self._rows = 0

    def reset(self) -> None:
        """Start again from zero."""
        self.discard()
        for total in self.totals():
            total.zero_()
        self.largest_values.zero_()
        self._reported = self.read()

    def read(self) -> AuditTotals:
        """Totals up to now; waits for the device."""
        # Copies also on a CPU, because the totals keep changing.
        return self._told([t.to("cpu", copy=True) for t in self.totals()])

    def totals(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the totals, on the device, in the order of `AuditTotals`. Does not wait for the device."""
        return self._histogram, self._pairs, self._retained, self._bound, self._largest_bound

    def line(self, totals: Sequence[torch.Tensor]) -> str | None:
        """The log line for what was audited since the last call, from `totals` that were copied to the host; None if
        nothing was."""
        now = self._told(totals)
        new, self._reported = now.since(self._reported), now
        return new.line()

    def _told(self, totals: Sequence[torch.Tensor]) -> AuditTotals:
        return AuditTotals(tuple(self.layers), self.num_heads, *totals)


def _drawn(x: torch.Tensor) -> torch.Tensor:
    """Hash of int64 numbers, below 2^_HASH_BITS."""
    # The shifts are arithmetic. The sign bits that they shift in do no harm to the hash.
    x = (x ^ (x >> 32)) * _MIX
    x = (x ^ (x >> 29)) * _BY_LAYER
    return (x >> 32) & (2**_HASH_BITS - 1)


class LayerAudit:
    """One layer's part of an audit; everything here may run under CUDA graph capture."""

    def __init__(self, audit: Audit, index: int) -> None:
        self._audit = audit
        self._index = index

    def note_values(self, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Note the largest norm of values [T or more, H, D], which go to the cache's slots slot_mapping [T] int64.
        Values with negative slots are not written and do not count, and neither do values that are no finite numbers:
        one of them would be the bound of all requests from then on."""
        tokens = slot_mapping.shape[0]
        if tokens == 0:
            return
        norms = torch.linalg.vector_norm(value[:tokens], dim=-1, dtype=torch.float32)
        norms.masked_fill_((slot_mapping < 0)[:, None] | ~norms.isfinite(), 0.0)
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
        soft_cap: float | None = None,
    ) -> None:
        """Measure the chosen pairs. query [T, Hq, D] and lse [T, Hq] are those of the step's first `rows` rows, which
        may read a selection."""
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
            soft_cap=soft_cap,
        )
        torch.index_select(lse, 0, audit._first_rows[:rows], out=audit.lse_selected[i, :rows])

"""Counts what a step has read. It counts after the step, because layers choose what they read during the step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from specattn_vllm.kernels.sketch.contracts import sampled_tokens
from specattn_vllm.stats import Counters


@dataclass(frozen=True)
class _Pending:
    rows: int
    chooses: bool
    verifies: torch.Tensor  # [R] int64 on the device, 1 or 0
    lens: torch.Tensor  # [R] int32, a copy
    context: torch.Tensor  # [R] int32: tokens before the step's own; a row that chose has scanned them
    on_host: dict[str, int]


class StepCounts:
    """Counts the last step when the next one begins, so that the host never waits for the device."""

    def __init__(
        self, counters: Counters, kept: torch.Tensor, dense: torch.Tensor, dense_up_to: int, searches: bool
    ) -> None:
        """kept [layers, R, H] int32: entries that each KV head read in the last step. dense [R] int32: 1 for dense
        rows. dense_up_to: contexts of up to this many tokens are dense. searches: whether longer contexts are
        searched through a sketch."""
        self.counters = counters
        self._kept, self._dense, self._dense_up_to, self._searches = kept, dense, dense_up_to, searches
        self._pending: _Pending | None = None
        self._fallen: torch.Tensor | None = None
        self._draws = 0

    def guard(self, fallen: torch.Tensor, draws: int) -> None:
        """Count for a guarantee. fallen [layers, R, H] int32: 1 for KV heads that had to read everything in the last
        step. draws: keys that each head reads to find out."""
        self._fallen, self._draws = fallen, draws

    def begin(
        self,
        rows: int,
        verifies: np.ndarray,
        exact: np.ndarray,
        small_batch: bool,
        prefilling: int,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        chooses: bool,
    ) -> None:
        """A step of R short rows begins. On the host: verifies [R] bool, rows past their prompt; exact [R] bool, rows
        whose request asked for exactness; prefilling, how many rows of the whole step are inside their prompt. On the
        device: seq_lens [R], query_start_loc [R+1]. If `chooses` is false, nothing is searched and all rows are
        dense."""
        self.fold()
        number = int(verifies.sum())
        self.counters.add(prefill_rows=prefilling)
        if not number:
            return
        # The next step overwrites vLLM's seq_lens and query_start_loc.
        lens = seq_lens.clone()
        context = lens - (query_start_loc[1:] - query_start_loc[:-1])
        mask = torch.from_numpy(verifies.astype(np.int64))
        mask = mask.pin_memory().to(seq_lens.device, non_blocking=True) if seq_lens.is_cuda else mask
        exact_rows = int((exact & verifies).sum())
        # Added together with sparse_rows in `fold`: rows that are in no group must never decrease.
        on_host = {
            "verify_rows": number,
            "exact_rows": exact_rows,
            "small_batch_rows": number - exact_rows if small_batch else 0,
        }
        self._pending = _Pending(rows, chooses, mask, lens, context, on_host)

    def fold(self) -> None:
        """Count the step that is over."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self.counters.add(**pending.on_host)
        layers, _, heads = self._kept.shape
        per_token = layers * heads
        verifies = pending.verifies
        full = (pending.lens * verifies).sum() * per_token
        if not pending.chooses:
            self.counters.add(kv_full=full, kv_read=full)
            return
        read = self._kept[:, : pending.rows].sum(dim=(0, 2), dtype=torch.int64)
        chosen = (self._dense[: pending.rows] == 0) & (pending.context > self._dense_up_to)
        chose = verifies * chosen
        self.counters.add(
            kv_full=full,
            kv_read=(read * verifies).sum(),
            sparse_rows=chose.sum(),
        )
        if self._fallen is not None:
            checked = chose.sum() * per_token
            fallen = self._fallen[:, : pending.rows].sum(dim=(0, 2), dtype=torch.int64)
            # A key is half an entry.
            self.counters.add(
                heads_checked=checked, heads_fallen=(fallen * chose).sum(), kv_read=checked * self._draws // 2
            )
        if self._searches:
            self.counters.add(
                kv_scanned=(pending.context * chose).sum() * per_token,
                kv_sampled=(sampled_tokens(pending.context) * chose).sum() * per_token,
            )

    def discard(self) -> None:
        """Forget the last step: it was a warm-up."""
        self._pending = None

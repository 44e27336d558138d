"""Drafting by a sketch: all draft steps of a round read the selection that its first step makes.

A search costs a draft model about as much time as sparse attention saves in one step, so there is one search per round.
Each later step has one more token in its context, and no other new token. The page tables of the first step already
list these tokens, after the entries that the first step reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from specattn_vllm.kernels.sketch.contracts import sampled_tokens
from specattn_vllm.methods.budget import with_sketch
from specattn_vllm.selection.own_choice import ChoiceStep, measure
from specattn_vllm.sketch.attach import make_sketch
from specattn_vllm.sketch.budget import draft_budget_of
from specattn_vllm.sketch.centre import measure_centres
from specattn_vllm.sketch.step import Sketch
from specattn_vllm.stats import Counters

if TYPE_CHECKING:
    from specattn_vllm.backend.metadata import SpecAttnMetadata
    from specattn_vllm.speculation.rounds import RoundSpeculator


class DraftSketch:
    """The sketch of a draft model. The host never waits and buffers keep their addresses, for CUDA graph capture."""

    def __init__(self, sketch: Sketch, counters: Counters) -> None:
        self.sketch = sketch
        self.counters = counters
        self.first_lens = torch.zeros_like(sketch.dense)
        """[R] int32: context length of each row in the first step."""
        self._first: ChoiceStep | None = None

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each kind of buffer."""
        return self.sketch.nbytes

    def begin(
        self, metadata: SpecAttnMetadata, query_start_loc_cpu: torch.Tensor, valid_lens: torch.Tensor | None = None
    ) -> ChoiceStep | None:
        """Begin a round: in its first step the short rows choose. query_start_loc_cpu [R+1] on the host;
        valid_lens [R]: how many tokens of each row are not rejected drafts, None if no row has rejected drafts."""
        self._first = self.sketch.step(query_start_loc_cpu)
        if self._first is not None:
            rows = self._first.num_rows
            self.first_lens[:rows].copy_(metadata.seq_lens[:rows])
            if valid_lens is not None:
                self.sketch.valid_lens[:rows].copy_(valid_lens[:rows])
        return self._first

    def follow(self, metadata: SpecAttnMetadata) -> ChoiceStep | None:
        """A later step of the round, with one token per row."""
        if self._first is None:
            return None
        rows, sketch = self._first.num_rows, self.sketch
        newer = metadata.seq_lens[:rows] - self.first_lens[:rows]
        kept = sketch.kept[:, :rows]
        # Padded rows of a CUDA graph's batch read nothing.
        torch.mul(kept + newer[:, None], kept > 0, out=sketch.following[:, :rows])
        return replace(self._first, num_tokens=rows, max_query_len=1, follows=True)

    def count(self, last_lens: torch.Tensor, query_lens: torch.Tensor, num_steps: int) -> None:
        """Count a finished round. last_lens [R] int32: context length of each row in its last step; query_lens [R]
        int32: tokens of each row in its first step."""
        if self._first is None:
            return
        rows, sketch = self._first.num_rows, self.sketch
        per_token = sketch.shape.layers * sketch.num_kv_heads
        kept, first = sketch.kept[:, :rows], self.first_lens[:rows]
        live = kept[0, :, 0] > 0
        later = num_steps - 1
        # The context grows by one token per step, up to last_lens.
        seen = last_lens[:rows] * later - later * (later - 1) // 2
        seen = torch.where(live, seen, 0).sum(dtype=torch.int64)
        first_seen = torch.where(live, first, 0)
        read = kept.sum(dtype=torch.int64) * num_steps
        newer = seen - first_seen.sum(dtype=torch.int64) * later
        scanned = first_seen - query_lens[:rows]
        searched = scanned > sketch.budget.dense_up_to
        sampled = torch.where(searched, sampled_tokens(scanned), 0).sum(dtype=torch.int64)
        scanned = torch.where(searched, scanned, 0).sum(dtype=torch.int64)
        self.counters.on_device("draft_kv_full").add_(first_seen.sum(dtype=torch.int64) + seen, alpha=per_token)
        self.counters.on_device("draft_kv_read").add_(read + newer * per_token)
        self.counters.on_device("draft_kv_scanned").add_(scanned, alpha=per_token)
        self.counters.on_device("draft_kv_sampled").add_(sampled, alpha=per_token)


def prepare_drafting(
    speculator: RoundSpeculator, layers: dict[str, Any], model: Callable[..., object], max_query_len: int
) -> DraftSketch:
    """Give the draft model's layers, keyed by vLLM's names, their sketch. Called when `model`, the draft model, is
    loaded, before vLLM measures the memory left for the KV cache. max_query_len: most tokens of a row in a round's
    first step."""
    options = with_sketch(speculator.options)
    if options is None:
        raise TypeError(
            f"method {speculator.options.method!r} drafts by a sketch, but its options do not describe one: make them "
            "a SketchedDraftOptions"
        )
    sketch, choices = make_sketch(
        layers,
        speculator,
        speculator.operations,
        draft_budget_of(options),
        options.sketch_bits,
        speculator.counters,
        max_query_len,
        steps_ahead=speculator.num_speculative_steps - 1,
    )
    sketch.dense.zero_()
    measure([*choices.values()], speculator.operations, speculator.counters.on_device("draft_selection_ns"))
    for name, choice in choices.items():
        layers[name].impl.choice = choice
    measure_centres(model, choices.values(), speculator.vllm_config, speculator.device)
    return DraftSketch(sketch, speculator.counters)

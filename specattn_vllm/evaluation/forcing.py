"""Forced decoding: an engine that speculates through a given text, and shows the target's logits at each place.

The engine is a real one and takes its own path: the draft runs all its steps, its attention is captured, selections are
made, and the target verifies through them. Two decisions are taken away from it, both about which token comes next:

sample_draft  (`DraftModelSpeculator`, vLLM's base of every speculator that runs a model). A draft step's token is the
              text's, not the draft's own. So the draft attends from the true tokens, and what it selects is what
              it would have selected with all of them accepted. The text is read from a table on the device by slot and
              position: this runs inside CUDA graphs, for rows of a graph that nobody uses too. Where the table holds
              no text for a row, the draft's own choice stands, so the same engine also runs free.
sample        (`GPUModelRunner`, after the target's forward pass). The logits of every verified position go to the
              observer, and what is sampled is the text: all drafts are accepted, and the token after them is the
              text's as well. vLLM's synthetic acceptance accepts drafts, but takes the token after them from the
              target. Nothing here is in a graph. Where requests run free, what they sampled is counted for each.

The draft's logits are kept from the one to the other, by slot and step, so that the observer sees those of both models
for the same token: a draft that is forced says nothing of what would have been accepted.

Both are put on vLLM's classes for as long as the engine lives, since its graphs are captured while it is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

NO_TEXT = -1
NOWHERE = -1

Observer = Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Called per request and step with its name, the position of the first token it was verified on, the tokens that follow
in the text [n] int64, the target's logits for them [n, vocabulary], and of a round of K drafts, where n is K + 1, the
draft's for the first K of them [K, vocabulary], else None."""


class ForcingError(RuntimeError):
    """The engine did not do what was forced, so that its figures would be about something else."""


class Drafted:
    """The draft's logits of each slot's last round, kept until the target has verified its drafts. For `slots` requests
    at a time.

    logits  [slots + 1, K, vocabulary], and the positions that they were made at, [slots + 1, K] int64. The last slot is
            nobody's: rows that only fill a graph's batch have slot -1.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._logits: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None

    def keep(
        self, logits: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, step: torch.Tensor, steps: int
    ) -> None:
        """Of one draft step, logits [R, vocabulary] made at positions [R] for slots [R]; `step`, of `steps`, is a
        number on the device. Runs inside CUDA graphs."""
        if self._logits is None:
            # The first is a dummy run of vLLM's, before any graph, and before it measures what is left for the cache.
            shape = (self._slots + 1, steps)
            self._logits = torch.zeros((*shape, logits.shape[1]), dtype=logits.dtype, device=logits.device)
            self._positions = torch.full(shape, NOWHERE, dtype=torch.int64, device=logits.device)
        at = slots, step.reshape(1).expand(slots.shape[0])  # a number by itself would be brought to the host
        self._logits[at] = logits
        self._positions[at] = positions

    def round_of(self, slot: int, positions: torch.Tensor) -> torch.Tensor | None:
        """[K, vocabulary], for the tokens after all but the last of `positions` [n], at which a slot's request was
        verified; None where these are no round, with K drafts."""
        if self._logits is None or len(positions) != self._logits.shape[1] + 1:
            return None
        if not torch.equal(self._positions[slot], positions[:-1]):
            raise ForcingError(
                f"drafts were made at positions {self._positions[slot].tolist()}, and verified at {positions.tolist()}"
            )
        return self._logits[slot]


class Forcing:
    """Holds texts by request slot, and steers one engine through them."""

    def __init__(self, slots: int, length: int, device: torch.device) -> None:
        """For `slots` requests at a time (vLLM's max_num_seqs) and texts of up to `length` tokens."""
        # The last row is nobody's: rows that only fill a graph's batch have slot -1. One more column, as the table is
        # asked for the token after the last.
        self._table = torch.full((slots + 1, length + 1), NO_TEXT, dtype=torch.int64, device=device)
        self._texts: Mapping[str, Sequence[int]] = {}
        self._seated: dict[int, str] = {}
        self._observe: Observer | None = None
        self._counted: dict[str, list[int]] | None = None
        self._drafted = Drafted(slots)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Engines made inside run on these hooks, and must end inside."""
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

        sample_draft, sample = DraftModelSpeculator.sample_draft, GPUModelRunner.sample

        @functools.wraps(sample_draft)
        def forced_draft(
            speculator, hidden_states, positions, idx_mapping, temperature, seeds, draft_step, *args, **kwargs
        ):
            own = sample_draft(
                speculator, hidden_states, positions, idx_mapping, temperature, seeds, draft_step, *args, **kwargs
            )
            logits = speculator.compute_draft_logits(hidden_states, kwargs.get("spec_step_idx", 0))
            self._drafted.keep(logits, positions, idx_mapping, draft_step, speculator.num_speculative_steps)
            return self._draft(own, positions, idx_mapping)

        @functools.wraps(sample)
        def forced_sample(runner, hidden_states, input_batch, grammar_output):
            if self._observe is None:
                sampled = sample(runner, hidden_states, input_batch, grammar_output)
                if self._counted is not None:
                    self._count(input_batch, sampled[1])
                return sampled
            return self._sample(runner, hidden_states, input_batch)

        DraftModelSpeculator.sample_draft, GPUModelRunner.sample = forced_draft, forced_sample
        try:
            yield
        finally:
            DraftModelSpeculator.sample_draft, GPUModelRunner.sample = sample_draft, sample

    @contextmanager
    def through(self, texts: Mapping[str, Sequence[int]], observe: Observer) -> Iterator[None]:
        """Inside, each request named in `texts` is led through its text, prompt included. All requests must be."""
        self._texts, self._observe = texts, observe
        try:
            yield
        finally:
            self._texts, self._observe = {}, None
            self._seated.clear()
            self._table.fill_(NO_TEXT)

    @contextmanager
    def counting(self) -> Iterator[dict[str, list[int]]]:
        """Inside, requests run free. Gives, by name, the rounds of each and the tokens that they gave, which the plugin
        only counts over all requests."""
        self._counted = {}
        try:
            yield self._counted
        finally:
            self._counted = None

    def _count(self, batch: Any, num_sampled: torch.Tensor) -> None:
        """Add the requests of a batch whose drafts were verified; num_sampled [R]. Waits for the device."""
        drafts = batch.num_draft_tokens_per_req
        if drafts is None:
            return
        for row, (request, tokens) in enumerate(zip(batch.req_ids, num_sampled.tolist(), strict=False)):
            if drafts[row] > 0 and not batch.is_prefilling_np[row]:
                of_request = self._counted.setdefault(_name(request), [0, 0])
                of_request[0] += 1
                of_request[1] += tokens

    def _draft(self, own: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Tokens that follow `positions` [R] in the texts of `slots` [R]; `own` [R] where there is none."""
        following = (positions + 1).clamp(max=self._table.shape[1] - 1)
        text = self._table[slots, following]
        return torch.where(text != NO_TEXT, text, own)

    def _sample(self, runner: Any, hidden_states: torch.Tensor, batch: Any) -> tuple:
        """What `GPUModelRunner.sample` returns, with the texts in the place of what would be sampled."""
        from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        self._seat(batch)
        logits = runner.model.compute_logits(hidden_states[batch.logits_indices])
        slots, positions = batch.expanded_idx_mapping, batch.positions[batch.logits_indices]
        given = self._table[slots, positions]
        if not torch.equal(given, batch.input_ids[batch.logits_indices].long()):
            # `specattn eval methods` refuses the drafters for which this is known.
            raise ForcingError(
                f"the target was run on other tokens than the text's ({', '.join(batch.req_ids)}): the speculator did "
                "not take its drafts from DraftModelSpeculator.sample_draft"
            )
        following = self._table[slots, positions + 1]
        starts = batch.cu_num_logits_np
        rows, width = len(batch.req_ids), runner.num_speculative_steps + 1
        sampled = torch.zeros((rows, width), dtype=torch.int64, device=logits.device)
        firsts = positions.tolist()
        for row, request in enumerate(batch.req_ids):
            begin, end = int(starts[row]), int(starts[row + 1])
            sampled[row, : end - begin] = following[begin:end]
            if not batch.is_prefilling_np[row]:
                drafts = self._drafted.round_of(int(batch.idx_mapping_np[row]), positions[begin:end])
                self._observe(_name(request), firsts[begin], following[begin:end], logits[begin:end], drafts)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            torch.tensor(starts[1:] - starts[:-1], dtype=torch.int32, device=logits.device),
            batch.seq_lens,
            batch.cu_num_logits,
            batch.idx_mapping,
            runner.req_states.prefill_len.gpu,
        )
        output = SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
        return output, num_sampled, num_rejected

    def _seat(self, batch: Any) -> None:
        """Write the texts of requests that are new in their slots into the table."""
        for slot, request in zip(batch.idx_mapping_np.tolist(), batch.req_ids, strict=True):
            if self._seated.get(slot) == request:
                continue
            name = _name(request)
            if name not in self._texts:
                raise ForcingError(f"request {request} runs beside forced ones, but has no text")
            text = torch.tensor(self._texts[name], dtype=torch.int64, device=self._table.device)
            self._table[slot].fill_(NO_TEXT)
            self._table[slot, : text.shape[0]] = text
            self._seated[slot] = request


def _name(request: str) -> str:
    """The name that the caller gave a request; vLLM appends a part of its own."""
    return request.rsplit("-", 1)[0]

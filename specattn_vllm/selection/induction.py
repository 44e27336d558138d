"""What layers that copy attend to, found by the tokens themselves.

Induction heads attend to what came after earlier occurrences of the token at hand (Olsson et al., arXiv 2209.11895). A
draft model of another size has other such heads, or none, so its attention foresees theirs worst of all. But a round's
tokens are known before the target verifies them, and so is the context: in layers that the map names, what follows an
earlier occurrence of one of them counts half of the mean more (`add_followers`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specattn_vllm.executors import Operations
from specattn_vllm.kernels.selection.contracts import MAX_TOKENS


class Induction:
    """Token ids by request slot, and the mass of the draft layers that choose for layers that copy.

    `enter` when a request is given a slot and `extend` in each round of drafting, whether anything is chosen in it or
    not; `add` before a choice. The last two may run under CUDA graph capture. Nothing waits for the device and every
    buffer lasts.

    ids  [num_slots + 1, L] int32: of each request its prompt, and what was sampled since. The last slot is nobody's, as
         in `SelectionStore`.
    """

    def __init__(
        self,
        operations: Operations,
        sources: Sequence[int],
        *,
        num_steps: int,
        max_num_reqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        """sources: indices of the draft layers in the capture. Raises ValueError for rounds of too many drafts."""
        if num_steps >= MAX_TOKENS:
            raise ValueError(
                f"the layer map names layers that copy, which takes at most {MAX_TOKENS - 1} draft tokens a round, not "
                f"{num_steps}: lower --num-speculative-tokens, or set induction=false"
            )
        self.operations = operations
        self.ids = torch.zeros((max_num_reqs + 1, max_model_len), dtype=torch.int32, device=device)
        self.sources = torch.tensor(sources, dtype=torch.int64, device=device)
        # A round gives its accepted drafts and one token more.
        self._back = torch.arange(num_steps + 1, device=device)

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.sources.nbytes + self._back.nbytes

    def enter(self, slot: int, token_ids: list[int]) -> None:
        """A request, new or resumed, with all of its tokens so far is given a slot. What it finds in the prefix cache
        goes through no model, so its prompt has to come from here."""
        given = torch.tensor(token_ids, dtype=torch.int32, pin_memory=self.ids.is_cuda)
        self.ids[slot, : len(token_ids)].copy_(given, non_blocking=True)

    def extend(
        self,
        slots: torch.Tensor,
        wanted: torch.Tensor,
        rows: torch.Tensor,
        starts: torch.Tensor,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Take in what a round of R requests begins with: the accepted drafts and the token sampled after them.

        input_ids [T] int32 and positions [T] int64 of the draft's first step; rows [R] int64: of each request, that of
        the sampled token; starts [R] int32: its first; slots [R] int64; wanted [R] bool: requests that sampled.
        """
        taken = rows[:, None] - self._back
        inside = wanted[:, None] & (taken >= starts[:, None])
        taken = taken.clamp_(min=0)
        self.ids[torch.where(inside, slots[:, None], -1), positions[taken]] = input_ids[taken]

    def add(
        self, mass: torch.Tensor, out: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor, drafts: torch.Tensor
    ) -> None:
        """out [N, R, G, L] float32 = the sources' mass [S, R, G, L], and more of it for what follows.

        slots [R] int64; lens [R] int32: tokens that are ranked, behind which the sampled one stands; drafts [R, K]
        int64.
        """
        sampled = self.ids[slots, lens.long()]
        tokens = torch.cat((sampled[:, None].long(), drafts), 1)
        self.operations.add_followers(mass, lens, out, self.sources, self.ids, slots, tokens)

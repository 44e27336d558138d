"""What a server would choose: the draft's attention in rounds, ranked.

A window ends in rounds of K + 1 rows, those of one verification each. The first K are the draft's steps too: the step
that drafts token k attends from the row of the token before. A selection is made of the context before the round's
first row; everything newer is read in any case. As in `selection/capture.py`: the steps' mass is summed, and the last
row, that of the bonus token which the draft never attends from, is the last step's moved on by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rounds:
    """Rounds at the end of windows of `window` tokens."""

    window: int
    count: int
    steps: int
    """K: tokens drafted in a round."""
    sink_tokens: int
    recent_tokens: int
    min_tokens: int = 0
    """Floor on kept tokens, always kept ones included."""

    @property
    def rows(self) -> int:
        """Rows of all rounds, the last ones of the window."""
        return self.count * (self.steps + 1)

    def contexts(self, device: torch.device | None = None) -> torch.Tensor:
        """[rounds] int64: tokens before each round's first row."""
        return self.window - self.rows + torch.arange(self.count, device=device) * (self.steps + 1)

    def old(self, device: torch.device) -> torch.Tensor:
        """[rounds, window] bool: the tokens that a round's selection is made of."""
        return torch.arange(self.window, device=device) < self.contexts(device)[:, None]

    def newer(self, device: torch.device) -> torch.Tensor:
        """[rows, window] bool: what each row reads in any case, its round's tokens up to itself."""
        position = torch.arange(self.window, device=device)
        rows = torch.arange(self.window - self.rows, self.window, device=device)[:, None]
        return (position <= rows) & ~self.old(device).repeat_interleave(self.steps + 1, 0)

    def mass(self, attention: torch.Tensor) -> torch.Tensor:
        """[G, rounds, window] float32 from the draft's attention [G, rows, window], a row's mean: 0 where nothing is
        chosen from."""
        by_step = attention.unflatten(1, (self.count, self.steps + 1))[:, :, : self.steps]
        total = by_step.sum(2)
        total[..., 1:] += by_step[:, :, -1, :-1]
        return total * self.old(attention.device) / (self.steps + 1)

    def with_followers(self, mass: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The same mass with more of it for what follows an earlier occurrence of one of the round's tokens, as in
        `selection/induction.py`; ids [window]."""
        ids = ids.to(mass.device)
        tokens = ids[-self.rows :].view(self.count, -1)
        follows = torch.zeros(self.count, self.window, dtype=torch.bool, device=mass.device)
        for column in tokens.unbind(1):
            follows[:, 1:] |= ids[:-1] == column[:, None]
        return mass + follows * self.old(mass.device) * (0.5 / self.contexts(mass.device))[:, None]

    def ranks(self, mass: torch.Tensor) -> torch.Tensor:
        """[G, rounds, window] int32: each token's place in the order in which tokens are kept, always kept ones first.

        Tokens that nothing is chosen from come behind all others.
        """
        position, contexts = torch.arange(self.window, device=mass.device), self.contexts(mass.device)[:, None]
        always = (position < self.sink_tokens) | (position >= contexts - self.recent_tokens)
        weight = mass.masked_fill(always, float("inf")).masked_fill(position >= contexts, -1.0)
        order = torch.sort(weight, dim=-1, descending=True, stable=True).indices
        places = torch.arange(self.window, dtype=torch.int32, device=mass.device).expand_as(weight)
        return torch.empty_like(weight, dtype=torch.int32).scatter_(-1, order, places)

    def keep(self, ranks: torch.Tensor, share: float) -> torch.Tensor:
        """[G, rounds, window] bool: the first ceil(share * context) tokens, and no fewer than are always kept or
        `min_tokens`."""
        wanted = (self.contexts(ranks.device).double() * share).ceil().long()
        least = max(self.sink_tokens + self.recent_tokens, self.min_tokens)
        return (ranks < wanted.clamp(min=least)[:, None]) & self.old(ranks.device)

    def masks(self, keep: torch.Tensor) -> torch.Tensor:
        """[G, rows, window] bool: what each row attends to."""
        return keep.repeat_interleave(self.steps + 1, 1) | self.newer(keep.device)

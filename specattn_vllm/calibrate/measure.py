"""Both measurements, window after window: how alike layers and heads attend, and what reading less costs each layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from specattn_vllm.calibrate.models import Model
from specattn_vllm.calibrate.rounds import Rounds
from specattn_vllm.calibrate.shares import GRID
from specattn_vllm.calibrate.similarity import SIMILARITIES, jaccard
from specattn_vllm.calibrate.state import State


def sampled_queries(window: int, count: int, seed: int, index: int) -> torch.Tensor:
    """Query positions of the window of that index, ascending; none in its first sixteenth, since a query with a handful
    of keys says little about which keys a layer chooses."""
    first = window // 16
    # Of each window's own, so that one can be measured without those before it.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return (first + torch.randperm(window - first, generator=generator)[:count]).sort().values


def similarity_of_window(
    target: Model, draft: Model, ids: torch.Tensor, queries: torch.Tensor, kind: str, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """Means over the queries, of the `names` that are asked for: `layers` [target layers, draft layers] by that kind,
    and `heads` [target layers, draft layers, target KV heads, draft KV heads] by Jaccard's index. The target's rows are
    compared as they come, so those of one of its layers are in memory at a time, and the draft's."""
    theirs: dict[int, torch.Tensor] = {}
    draft.look(ids, queries, theirs.__setitem__)
    by_layer = [theirs[i] for i in range(draft.layers)]
    averaged = torch.stack([rows.mean(0) for rows in by_layer])
    lengths = queries.to(target.device) + 1
    found: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}

    def compare(layer: int, rows: torch.Tensor) -> None:
        found["layers"][layer] = SIMILARITIES[kind](rows.mean(0, keepdim=True), averaged, lengths)[0].cpu()
        if "heads" in names:
            found["heads"][layer] = torch.stack([jaccard(rows, one, lengths) for one in by_layer]).cpu()

    target.look(ids, queries, compare)
    return {name: torch.stack([of[j] for j in range(target.layers)]) / len(queries) for name, of in found.items()}


@dataclass(frozen=True)
class Chosen:
    """The order in which each target layer reads the tokens of a window's rounds: as its draft layer ranks them."""

    ids: torch.Tensor
    """[window]."""
    rounds: Rounds
    ranks: dict[tuple[int, bool], torch.Tensor]
    """Of a draft layer, without and with what follows the rounds' tokens: [G, rounds, window] int32."""
    layers: Sequence[int | None]
    heads: Sequence[Sequence[int] | None] | None

    @classmethod
    def by(
        cls, draft: Model, ids: torch.Tensor, rounds: Rounds, layers: Sequence[int | None],
        heads: Sequence[Sequence[int] | None] | None,
    ) -> Chosen:  # fmt: skip
        rows = torch.arange(len(ids) - rounds.rows, len(ids))
        ranks: dict[tuple[int, bool], torch.Tensor] = {}

        def rank(layer: int, attention: torch.Tensor) -> None:
            if layer in layers:
                mass = rounds.mass(attention if heads else attention.mean(0, keepdim=True))
                ranks[layer, False] = rounds.ranks(mass)
                ranks[layer, True] = rounds.ranks(rounds.with_followers(mass, ids))

        draft.look(ids, rows, rank)
        return cls(ids, rounds, ranks, layers, heads)

    def keep(self, layer: int, share: float, copies: bool) -> torch.Tensor:
        """[G, rounds, window] bool: what that share of the context is."""
        ranks = self.ranks[self.layers[layer], copies]
        return self.rounds.keep(ranks if self.heads is None else ranks[list(self.heads[layer])], share)


def induction_of_window(target: Model, chosen: Chosen, share: float) -> dict[str, torch.Tensor]:
    """Of each target layer's attention to the window, the share that it keeps where it reads that share of the context,
    means over the rounds' rows, [target layers]: `alone`, chosen by the draft alone, and `followed`, with what follows
    the rounds' tokens. Layers that stay dense have 0."""
    ids, rounds = chosen.ids, chosen.rounds
    found = {name: torch.zeros(target.layers, dtype=torch.float64) for name in ("alone", "followed")}

    def retained(layer: int, attention: torch.Tensor) -> None:
        if chosen.layers[layer] is not None:
            for name, copies in (("alone", False), ("followed", True)):
                kept = rounds.masks(chosen.keep(layer, share, copies))
                found[name][layer] = (attention * kept).sum(-1).mean().item()

    target.look(ids, torch.arange(len(ids) - rounds.rows, len(ids)), retained)
    return found


def cost_of_window(target: Model, chosen: Chosen, induction: Sequence[bool], with_kl: bool) -> dict[str, torch.Tensor]:
    """What each target layer's reading less costs, means over the rounds' rows, [target layers, GRID]: `read`, the
    share of the context that was read, `mass`, the share of the target's attention to the window that this holds, and
    `kl`, KL(all of it || this layer alone pruned) of the target's output in nats. Layers that stay dense have 0."""
    ids, rounds, layers = chosen.ids, chosen.rounds, chosen.layers
    found = {name: torch.zeros(target.layers, len(GRID), dtype=torch.float64) for name in ("read", "mass", "kl")}
    contexts = rounds.contexts(target.device)

    def keep(layer: int, share: float) -> torch.Tensor:
        return chosen.keep(layer, share, induction[layer])

    def retained(layer: int, attention: torch.Tensor) -> None:
        if layers[layer] is None:
            return
        for at, share in enumerate(GRID):
            kept = keep(layer, share)
            found["read"][layer, at] = (kept.sum(-1) / contexts).mean().item()
            found["mass"][layer, at] = (attention * rounds.masks(kept)).sum(-1).mean().item()

    dense = target.reference(ids, rounds.rows, retained)
    for layer in [j for j, i in enumerate(layers) if i is not None] if with_kl else ():
        for at, share in enumerate(GRID):
            pruned = target.pruned(ids, rounds.rows, {layer: rounds.masks(keep(layer, share))})
            found["kl"][layer, at] = (dense.exp() * (dense - pruned)).sum(-1).mean().item()
    return found


def over_windows(
    state: State, phase: str, ids: torch.Tensor, measure: Callable[[int], dict[str, torch.Tensor]],
    tick: Callable[[int], None],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Means over the windows, of which those that the state has are not measured again. `tick` is told how many are."""
    tick(state.done.get(phase, 0))
    for index in range(state.done.get(phase, 0), len(ids)):
        state.add(phase, measure(index))
        tick(index + 1)
    return {name: value / len(ids) for name, value in state.sums[phase].items()}

"""How much of the target's attention a draft layer, or one of its heads, retains by what it would choose.

Divergence asks how alike two layers attend. A server takes of the draft's attention an order of tokens and
reads the first of them, and a layer may be far from the target's in nats and name the right ones: KL(ours || theirs)
punishes a key that theirs leaves out so hard that the flattest layer wins, whatever it ranks first.

So each layer and head of the draft chooses as it would in a server, in rounds, and what counts is the mass that the
target's rows put on the choice and on what they read in any case.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from specattn_vllm.calibrate.models import Model
from specattn_vllm.calibrate.rounds import Rounds


def choices(rounds: Rounds, attention: torch.Tensor, share: float) -> torch.Tensor:
    """[G, rounds, window] bool from a draft layer's attention [G, rows, window]: what each of G would choose."""
    return rounds.keep(rounds.ranks(rounds.mass(attention)), share)


def retained(rounds: Rounds, attention: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[A, B] float64, means over the rounds' rows: the share of the target's attention [A, rows, window] that lies on
    what is chosen [B, rounds, window] and on the rows' own round up to themselves."""
    newer = rounds.newer(attention.device)
    always = (attention * newer).sum((1, 2), dtype=torch.float64)
    # The rows of a round read the same of its context, so they are added up before they are compared.
    older = (attention * ~newer).unflatten(1, (rounds.count, -1)).sum(2)
    on_chosen = torch.einsum("art,brt->ab", older.double(), chosen.double())
    return (on_chosen + always[:, None]) / rounds.rows


def retained_of_window(
    target: Model, draft: Model, ids: torch.Tensor, rounds: Rounds, share: float, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """Means over the rounds' rows, of the `names` that are asked for: `layers` [target layers, draft layers], a layer's
    heads averaged on both sides, and `heads` [target layers, draft layers, target KV heads, draft KV heads]. The rows
    of one layer are in memory at a time; of the draft's, what they choose is kept."""
    rows = torch.arange(len(ids) - rounds.rows, len(ids))
    chosen: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}
    found: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}

    def of(name: str, attention: torch.Tensor) -> torch.Tensor:
        return attention if name == "heads" else attention.mean(0, keepdim=True)

    def choose(layer: int, attention: torch.Tensor) -> None:
        for name in names:
            chosen[name][layer] = choices(rounds, of(name, attention), share).to(target.device)

    def compare(layer: int, attention: torch.Tensor) -> None:
        for name in names:
            ours = of(name, attention)
            by_layer = [retained(rounds, ours, chosen[name][i]).cpu() for i in range(draft.layers)]
            found[name][layer] = torch.stack(by_layer)

    draft.look(ids, rows, choose)
    target.look(ids, rows, compare)
    whole = {name: torch.stack([of[j] for j in range(target.layers)]) for name, of in found.items()}
    return {name: of.flatten(1) if name == "layers" else of for name, of in whole.items()}

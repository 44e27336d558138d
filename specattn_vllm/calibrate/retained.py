"""How much of the target's attention a draft layer, or one of its heads, retains by what it would choose.

Divergence and overlap ask how alike two layers attend. A server takes of the draft's attention an order of tokens and
reads the first of them, and a layer may be far from the target's in nats and name the right ones: KL(ours || theirs)
punishes a key that theirs leaves out so hard that the flattest layer wins, whatever it ranks first.

So each layer and head of the draft chooses as it would in a server, in rounds, and what counts is the mass that the
target's rows put on the choice and on what they read in any case.
"""

from __future__ import annotations

import torch

from specattn_vllm.calibrate.models import Model
from specattn_vllm.calibrate.paths import head_map
from specattn_vllm.calibrate.rounds import Rounds

RETAINED = "retained"


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
    target: Model, draft: Model, ids: torch.Tensor, rounds: Rounds, share: float, layers: bool, heads: bool
) -> dict[str, torch.Tensor]:
    """Means over the rounds' rows, as asked for: `layers` [target layers, draft layers], a layer's heads averaged on
    both sides, and `heads` [target layers, draft layers, target KV heads, draft KV heads]. The rows of one layer are in
    memory at a time; of the draft's, what they choose is kept."""
    rows = torch.arange(len(ids) - rounds.rows, len(ids))
    chosen: dict[str, dict[int, torch.Tensor]] = {"layers": {}, "heads": {}}
    found: dict[str, dict[int, torch.Tensor]] = {"layers": {}, "heads": {}}
    asked = [name for name, wanted in (("layers", layers), ("heads", heads)) if wanted]

    def of(name: str, attention: torch.Tensor) -> torch.Tensor:
        return attention if name == "heads" else attention.mean(0, keepdim=True)

    def choose(layer: int, attention: torch.Tensor) -> None:
        for name in asked:
            chosen[name][layer] = choices(rounds, of(name, attention), share).to(target.device)

    def compare(layer: int, attention: torch.Tensor) -> None:
        for name in asked:
            by_layer = [retained(rounds, of(name, attention), chosen[name][i]).cpu() for i in range(draft.layers)]
            found[name][layer] = torch.stack(by_layer)

    draft.look(ids, rows, choose)
    target.look(ids, rows, compare)
    all_layers = {name: torch.stack([found[name][j] for j in range(target.layers)]) for name in asked}
    if layers:
        all_layers["layers"] = all_layers["layers"].flatten(1)
    return all_layers


def layers_of_heads(heads: torch.Tensor, ranks: int) -> torch.Tensor:
    """[target layers, draft layers] from the `heads` of `retained_of_window`: what a target layer retains if each of
    its heads takes the best of the draft layer's, on its own rank."""
    m, n, ours, _ = heads.shape
    best = torch.tensor([[head_map(heads[j, i], ranks) for i in range(n)] for j in range(m)])
    return heads.gather(3, best.unsqueeze(-1)).squeeze(-1).mean(2)

"""What a setting keeps of one document, over the rounds of its forced run: for pictures, so in percentages of buckets.

Only selections of the plugin are seen, since they stand in its store; a peer makes its own in each layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from specattn_vllm.evaluation.results import Kept
from specattn_vllm.kernels.reference import unpack_bits

if TYPE_CHECKING:
    from specattn_vllm.selection.pruner import Pruner

BUCKETS = 64
"""At most, over the document's tokens."""


def watched(worker: Any) -> tuple[Pruner, list[str]]:
    """The pruner of an engine's worker in this process, and the names of the target's layers in order."""
    from vllm.model_executor.models.utils import extract_layer_index

    from specattn_vllm.speculation.wiring import target_builder

    groups, speculator = worker.model_runner.attn_groups, worker.model_runner.speculator
    names = {name for of in groups for group in of for name in group.layer_names}
    names = sorted(names - speculator.draft_attn_layer_names, key=extract_layer_index)
    return target_builder(groups, names).pruner, names


class KeptRecorder:
    """Looks at the selection of one request after each of its verifications, before the next replaces it."""

    def __init__(self, pruner: Pruner, layers: list[str], length: int) -> None:
        """layers: names of the target's layers in order; length: tokens of the document at its end."""
        self.pruner = pruner
        self.layers = layers
        self.bucket = -(-length // BUCKETS)
        self._contexts: list[int] = []
        self._rounds: list[torch.Tensor] = []
        self._shares: list[torch.Tensor] = []

    def add(self, slot: int, prefix: int) -> None:
        """The verification just made in a slot, of drafts after `prefix` tokens; waits for the device."""
        kept = self._kept(slot, prefix)
        self._contexts.append(prefix)
        self._shares.append(kept.mean(-1))
        padded = torch.nn.functional.pad(kept, (0, -prefix % self.bucket)).unflatten(-1, (-1, self.bucket))
        sizes = torch.full((padded.shape[1],), self.bucket)
        sizes[-1] = prefix - self.bucket * (len(sizes) - 1)
        self._rounds.append(padded.sum(-1) / sizes)

    def _kept(self, slot: int, prefix: int) -> torch.Tensor:
        """[layers, prefix] float32, the share of KV heads for which each token was kept."""
        pruner, store = self.pruner, self.pruner.store
        kept = torch.ones((len(self.layers), prefix))
        if int(store.prefix_lens[slot]) != prefix:
            return kept  # no selection, or one for another length: the row read everything
        for number, name in enumerate(self.layers):
            table = pruner.layer_sources.get(name)
            if table is None:
                continue
            if pruner.maps is None:
                bits = store.bits[table, slot]
            else:
                bits = store.bits[pruner.maps.sources[table], slot, pruner.maps.groups[table].long()]
            kept[number] = unpack_bits(bits.cpu(), prefix).float().mean(0)
        return kept

    def result(self, document: int) -> Kept:
        shares = torch.stack(self._shares).mean(0).tolist()
        return Kept(
            document=document,
            bucket=self.bucket,
            contexts=self._contexts,
            shares={name: round(share, 4) for name, share in zip(self.layers, shares, strict=True)},
            layers={
                name: [_line(buckets[number]) for buckets in self._rounds] for number, name in enumerate(self.layers)
            },
        )


def _line(shares: torch.Tensor) -> str:
    return " ".join(str(round(100 * share)) for share in shares.tolist())

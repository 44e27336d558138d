"""What the target attended to when a request last read everything, as one more sign of what it will attend to.

The draft looks ahead and sees what the target turns to next; the target's own attention says what it holds on to. It is
that of one verification until the next in which the request reads everything, and grows old in between: what it adds to
tokens that are no longer attended to is wasted, so its weight is small. A mean over several such verifications was no
better than the last.
"""

from __future__ import annotations

import torch

from specattn_vllm.executors import Operations


class History:
    """Mass of T layers by request slot: one row for a layer, the mean over its KV heads. A row for each would hardly
    choose better, and take half as much memory as all of the target's mass.

    mass [T, num_slots + 1, L] bfloat16, lens [num_slots + 1] int32: tokens that it covers, 0: there is none. The last
    slot is nobody's, as in `SelectionStore`. Nothing waits for the device and every buffer lasts.
    """

    def __init__(
        self,
        operations: Operations,
        *,
        layers: int,
        slots: int,
        max_model_len: int,
        weight: float,
        dilation: int,
        device: torch.device,
    ) -> None:
        """weight: what the mass is multiplied by before it is added; dilation: positions by which it is spread."""
        self.operations = operations
        self.weight = weight
        self.dilation = dilation
        self.mass = torch.zeros((layers, slots + 1, max_model_len), dtype=torch.bfloat16, device=device)
        self.lens = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self._layers = torch.arange(layers, device=device)

    @property
    def nbytes(self) -> int:
        return self.mass.nbytes + self.lens.nbytes + self._layers.nbytes

    def forget(self, slots: torch.Tensor) -> None:
        """Slots [R] int64 have new requests, or resumed ones."""
        self.lens.index_fill_(0, slots, 0)

    def keep(self, mass: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor) -> None:
        """Keep mass [R, T, H, L] float32 of requests in slots [R] int64 on their first lens [R] int32 tokens; of a
        request with lens 0, what there is stays."""
        layers = mass.shape[1]
        self.operations.average_mass(
            mass.flatten(0, 1),
            lens[:, None].expand(-1, layers).flatten().contiguous(),
            self.mass.view(-1, self.mass.shape[2]),
            self._rows(slots).transpose(0, 1).flatten().contiguous(),
            self.dilation,
        )
        self.lens[slots] = torch.where(lens > 0, lens, self.lens[slots])

    def add(
        self, mass: torch.Tensor, mass_rows: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor, out: torch.Tensor
    ) -> None:
        """out [T, R, H, L] float32 = row mass_rows [T, R, H] int64 of mass [Y, L], and the history of the request in
        slots [R] int64, on its first lens [R] int32 tokens."""
        tables, _, heads, width = out.shape
        rows = self._rows(slots)[..., None].expand(-1, -1, heads)
        known = torch.where(lens > 0, self.lens[slots], 0)
        self.operations.add_mass(
            mass,
            lens.view(1, -1, 1).expand(tables, -1, heads).flatten().contiguous(),
            out.view(-1, width),
            mass_rows.flatten(),
            self.mass.view(-1, width),
            rows.flatten().contiguous(),
            known.view(1, -1, 1).expand(tables, -1, heads).flatten().contiguous(),
            self.weight,
        )

    def _rows(self, slots: torch.Tensor) -> torch.Tensor:
        """[T, R] int64: rows of the history of requests in slots [R], counted over layers and slots."""
        number = self.lens.shape[0]
        return self._layers[:, None] * number + slots % number

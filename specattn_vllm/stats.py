"""The plugin's counters. Imports torch only when something is counted, because reports are read without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


GONE = ("refresh_rows", "audit_rows")


@dataclass
class Counts:
    """Totals since start-up. KV counts are in (token, KV head, layer) entries."""

    rounds: int = 0
    """Rows whose drafts were verified. A row is one request in one step."""
    sampled_tokens: int = 0
    """Tokens that these rows produced; divided by `rounds`, the acceptance length."""
    prefill_rows: int = 0
    verify_rows: int = 0
    """All rows past their prompt, with or without drafts. The five `_rows` counters below are subsets of them."""
    sparse_rows: int = 0
    """Rows that read a selection."""
    no_selection_rows: int = 0
    """Rows without a selection, if a draft model chooses; includes `exact_rows` and `small_batch_rows`."""
    stale_rows: int = 0
    """Rows with a selection that was made for another length."""
    kv_read: int = 0
    kv_full: int = 0
    """Entries of the target's cache for rows past their prompt: entries read, and entries present."""
    draft_kv_read: int = 0
    draft_kv_full: int = 0
    """The same for the cache that drafting reads, summed over draft steps. 0 if drafting is dense."""
    audited_pairs: int = 0
    """Pairs of a layer and a row whose retained mass was measured."""
    kv_scanned: int = 0
    """Entries whose sketch was searched before a sparse verification."""
    draft_kv_scanned: int = 0
    """The same for sparse drafting."""
    exact_rows: int = 0
    """Rows whose request asked for exactness."""
    small_batch_rows: int = 0
    """Other rows, in batches below the crossover."""
    kv_sampled: int = 0
    """Entries whose sketch was also read in a sample before the search, to normalise the scores of the query rows."""
    draft_kv_sampled: int = 0
    """The same for sparse drafting."""
    heads_checked: int = 0
    """With a guarantee: selections that were checked, each of one KV head in one layer of a row."""
    heads_fallen: int = 0
    """Those of them that might have lost too much, so that the head read everything."""
    selection_ns: int = field(default=0, compare=False)
    """Nanoseconds that the device took to choose what verification reads. Not compared: no two runs take as long."""
    draft_selection_ns: int = field(default=0, compare=False)
    """The same for sparse drafting."""

    @classmethod
    def stored(cls, counts: Mapping[str, int]) -> Counts:
        """Counts of a report; those of an older version have reasons that are gone."""
        return cls(**{name: count for name, count in counts.items() if name not in GONE})

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def acceptance_length(self) -> float:
        """Mean number of tokens per verification, with the bonus token."""
        return self.sampled_tokens / self.rounds if self.rounds else 0.0

    @property
    def kv_fraction(self) -> float:
        """Share of the KV entries of rows past their prompt that were read, with dense layers."""
        return self.kv_read / self.kv_full if self.kv_full else 1.0

    @property
    def scanned_fraction(self) -> float:
        """Share of the KV entries of rows past their prompt whose sketch was searched."""
        return self.kv_scanned / self.kv_full if self.kv_full else 0.0

    @property
    def draft_kv_fraction(self) -> float:
        """Share of the KV entries that drafting read; 1 if drafting is dense."""
        return self.draft_kv_read / self.draft_kv_full if self.draft_kv_full else 1.0

    @property
    def by_own_choice(self) -> bool:
        """Whether these are counts of a target that chooses for itself. Its rows never lack a selection."""
        return not self.no_selection_rows and bool(self.kv_scanned or self.exact_rows or self.small_batch_rows)

    @property
    def short_context_rows(self) -> int:
        """Dense rows of a target that chooses for itself, for no other reason than their short context."""
        return self.verify_rows - self.sparse_rows - self.exact_rows - self.small_batch_rows

    @property
    def unselected_rows(self) -> int:
        """Rows without a selection that should have had one."""
        return max(self.no_selection_rows - self.exact_rows - self.small_batch_rows, 0)

    def line(self, seconds: float) -> str:
        """The log line for these counts, which were made in `seconds`."""
        head = f"specattn: {self.rounds} rounds in {seconds:.0f} s, acceptance length {self.acceptance_length:.2f}, "
        drafting = f", drafting read {self.draft_kv_fraction:.1%} of KV" if self.draft_kv_full else ""
        if not self.verify_rows:
            return f"{head}verification read all of KV (no row was pruned){drafting}"
        read = f"read {self.kv_fraction:.1%} of KV"
        dense = f"{self.verify_rows - self.sparse_rows} (exact {self.exact_rows}, small batch {self.small_batch_rows}, "
        prefill = f"prefill rows {self.prefill_rows}"
        if self.by_own_choice:
            searched = f" and searched the sketch of {self.scanned_fraction:.1%}" if self.kv_scanned else ""
            rows = f"dense rows {dense}short context {self.short_context_rows})"
            return f"{head}target {read}{searched}{drafting}{self._guarantee}, {rows}, {prefill}"
        rows = f"dense verification rows {dense}no selection {self.unselected_rows}, stale {self.stale_rows})"
        return f"{head}verification {read}{drafting}, {rows}, {prefill}"

    @property
    def _guarantee(self) -> str:
        if not self.heads_checked:
            return ""
        held = 1 - self.heads_fallen / self.heads_checked
        return f", guarantee held in {held:.1%} of {self.heads_checked} selections"


_NAMES = tuple(f.name for f in fields(Counts))


class Reading:
    """An asynchronous copy of the totals and of other tensors to the host, as they were when the copy began. Ask
    `ready` before you use it; nothing waits."""

    def __init__(self, host: Sequence[int], device: torch.Tensor, extra: Sequence[torch.Tensor] = ()) -> None:
        import torch

        self._host = tuple(host)
        # With non_blocking, PyTorch copies a GPU tensor to pinned memory.
        self._copies = [t.to("cpu", non_blocking=True, copy=True) for t in (device, *extra)]
        self._event = None
        if device.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def ready(self) -> bool:
        """Whether the copy is complete; does not wait."""
        return self._event is None or self._event.query()

    def counts(self) -> Counts:
        """The totals. Call it only when `ready`."""
        return _sums(self._host, self._copies[0])

    def extra(self) -> list[torch.Tensor]:
        """The other tensors, on the host. Call it only when `ready`."""
        return self._copies[1:]


def _sums(host: Sequence[int], device: torch.Tensor) -> Counts:
    return Counts(*(on_host + there for on_host, there in zip(host, device.tolist(), strict=True)))


class Counters:
    """Counts kept partly on the device, so that counting never waits for it. `read` waits, `begin_read` does not.

    Each amount that `add` adds on the device costs a kernel launch. So kernels count into vectors (`stage_vector`) or
    directly into the totals (`on_device`).
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._host = [0] * len(_NAMES)
        self._staged: list[dict[str, int | torch.Tensor]] = []
        self._vectors: list[tuple[int, torch.Tensor]] = []
        self._device = torch.zeros(len(_NAMES), dtype=torch.int64, device=device)

    def add(self, **amounts: int | torch.Tensor) -> None:
        """Add to counters by name: host ints, or zero-dimensional device tensors."""
        import torch

        for name, amount in amounts.items():
            index = _NAMES.index(name)
            if isinstance(amount, torch.Tensor):
                # One by one: a tensor of indices would have to be copied from the host, and the copy would wait.
                self._device[index].add_(amount)
            else:
                self._host[index] += amount

    def stage(self, **amounts: int | torch.Tensor) -> None:
        """Hold amounts back until it is known whether the step was real or a warm-up of vLLM's."""
        self._staged.append(amounts)

    def stage_vector(self, names: tuple[str, ...], amounts: torch.Tensor) -> None:
        """Hold back amounts [len(names)] int64 on the device. `names` must be consecutive fields of `Counts`."""
        first = _NAMES.index(names[0])
        if _NAMES[first : first + len(names)] != names:
            raise ValueError(f"{names} do not follow one another in Counts")
        self._vectors.append((first, amounts))

    def on_device(self, name: str) -> torch.Tensor:
        """The device's part of one total, [1] int64. Operations may add to it directly."""
        index = _NAMES.index(name)
        return self._device[index : index + 1]

    def commit(self) -> None:
        """Add the staged amounts."""
        for amounts in self._staged:
            self.add(**amounts)
        for first, amounts in self._vectors:
            self._device[first : first + amounts.shape[0]].add_(amounts)
        self.discard()

    def discard(self) -> None:
        """Forget the staged amounts."""
        self._staged.clear()
        self._vectors.clear()

    def reset(self) -> None:
        """Start again from zero."""
        self._host = [0] * len(_NAMES)
        self._device.zero_()
        self.discard()

    def read(self) -> Counts:
        """Totals up to now; waits for the device."""
        return _sums(self._host, self._device)

    def begin_read(self, extra: Sequence[torch.Tensor] = ()) -> Reading:
        """Begin to copy the current totals, and other tensors of the device, to the host. Does not wait."""
        return Reading(self._host, self._device, extra)

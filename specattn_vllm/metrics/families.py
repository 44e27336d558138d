"""The metrics: name, kind, description, and how each is made from a snapshot.

A metric that an engine does not count has no series, because a zero would mean that it was counted. docs/metrics.md has
the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from specattn_vllm.metrics.snapshot import INFO, Snapshot

Values = Mapping[tuple[str, ...], float]


@dataclass(frozen=True)
class Family:
    """One metric. `labels` come after the label `engine`, and after `rank` if `every_rank`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...]
    values: Callable[[Snapshot], Values]
    """Label values -> value. For a histogram: upper bound, as text -> number of samples up to it."""
    every_rank: bool = False
    """Whether each rank has its own value, because it holds its own KV heads. Else rank 0 has the engine's value."""

    @property
    def all_labels(self) -> tuple[str, ...]:
        return ("engine", *(("rank",) if self.every_rank else ()), *self.labels)


def _rounds(found: Snapshot, value: int) -> Values:
    return {(): value} if found.drafts else {}


def _rows(found: Snapshot) -> Values:
    counts = found.counts
    if not found.dense_reasons:
        return {}
    kinds = {
        "sparse": counts.sparse_rows,
        "dense": counts.verify_rows - counts.sparse_rows,
        "prefill": counts.prefill_rows,
    }
    return {(kind,): value for kind, value in kinds.items()}


def _dense_rows(found: Snapshot) -> Values:
    counts = found.counts
    by_reason = {
        "exact": counts.exact_rows,
        "small batch": counts.small_batch_rows,
        "short context": counts.short_context_rows,
        "no selection": counts.unselected_rows,
        "stale": counts.stale_rows,
    }
    return {(reason,): by_reason[reason] for reason in found.dense_reasons}


def _entries(found: Snapshot, what: str) -> dict[str, int]:
    prefixes = {"verification": "", "drafting": "draft_"}
    return {by: getattr(found.counts, f"{prefixes[by]}kv_{what}") for by in found.caches}


def _by(values: Mapping[str, float]) -> Values:
    return {(by,): value for by, value in values.items()}


def _searched(found: Snapshot) -> Values:
    return _by({by: n for by, n in _entries(found, "scanned").items() if found.caches[by].code})


def _bytes_read(found: Snapshot) -> Values:
    read, scanned, sampled = (_entries(found, what) for what in ("read", "scanned", "sampled"))
    return _by(
        {by: read[by] * cache.entry + (scanned[by] + sampled[by]) * cache.code for by, cache in found.caches.items()}
    )


def _bytes_present(found: Snapshot) -> Values:
    return _by({by: n * found.caches[by].entry for by, n in _entries(found, "full").items()})


def _selecting(found: Snapshot) -> Values:
    taken = {"verification": found.counts.selection_ns, "drafting": found.counts.draft_selection_ns}
    return _by({by: taken[by] / 1e9 for by in found.caches})


def _guaranteed(found: Snapshot) -> Values:
    counts = found.counts
    if not counts.heads_checked or "verification" not in found.caches:
        return {}
    return {("held",): counts.heads_checked - counts.heads_fallen, ("read everything",): counts.heads_fallen}


def _audited(found: Snapshot) -> Values:
    return {} if found.audited is None else {(f"{edge:g}",): n for edge, n in found.audited.buckets}


FAMILIES = (
    Family(
        "specattn:info",
        "gauge",
        "Method, budget, executor and versions of the engine, as labels. The value is always 1.",
        INFO,
        lambda found: {tuple(found.info[label] for label in INFO): 1},
    ),
    Family(
        "specattn:rounds_total",
        "counter",
        "Rounds: verifications of drafts, each of one request in one step.",
        (),
        lambda found: _rounds(found, found.counts.rounds),
    ),
    Family(
        "specattn:sampled_tokens_total",
        "counter",
        "Tokens that verifications produced. Divided by rounds, this is the acceptance length.",
        (),
        lambda found: _rounds(found, found.counts.sampled_tokens),
    ),
    Family(
        "specattn:rows_total",
        "counter",
        "Rows, each a request in a step of the target: inside its prompt (prefill), or past it and reading a part "
        "(sparse) or all (dense) of its KV cache.",
        ("kind",),
        _rows,
    ),
    Family(
        "specattn:dense_rows_total",
        "counter",
        "Rows of the kind dense, by the reason why they read all of their KV cache.",
        ("reason",),
        _dense_rows,
    ),
    Family(
        "specattn:kv_entries_read_total",
        "counter",
        "Entries of the KV cache, one for each token, KV head and layer, that were read.",
        ("by",),
        lambda found: _by(_entries(found, "read")),
        every_rank=True,
    ),
    Family(
        "specattn:kv_entries_present_total",
        "counter",
        "Entries of the KV cache that would have been read without a selection.",
        ("by",),
        lambda found: _by(_entries(found, "full")),
        every_rank=True,
    ),
    Family(
        "specattn:kv_entries_searched_total",
        "counter",
        "Entries of the KV cache whose sketch was searched to choose what is read.",
        ("by",),
        _searched,
        every_rank=True,
    ),
    Family(
        "specattn:kv_bytes_read_total",
        "counter",
        "Bytes of the KV cache that were read, including the sketches that were searched and sampled.",
        ("by",),
        _bytes_read,
        every_rank=True,
    ),
    Family(
        "specattn:kv_bytes_present_total",
        "counter",
        "Bytes of the KV cache that would have been read without a selection.",
        ("by",),
        _bytes_present,
        every_rank=True,
    ),
    Family(
        "specattn:selection_seconds_total",
        "counter",
        "Seconds that the device took to choose what is read, and to list it as pages.",
        ("by",),
        _selecting,
        every_rank=True,
    ),
    Family(
        "specattn:guarantee_selections_total",
        "counter",
        "With a guarantee: selections of one KV head in one layer of a row, by whether the guarantee held or the head "
        "had to read everything.",
        ("result",),
        _guaranteed,
        every_rank=True,
    ),
    Family(
        "specattn:audit_retained_mass",
        "histogram",
        "Share of a query head's attention mass that the selection held, in the audited pairs of layer and request.",
        (),
        _audited,
        every_rank=True,
    ),
)

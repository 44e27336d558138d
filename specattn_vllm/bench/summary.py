"""From the samples of a cell to the figures that tables show."""

from __future__ import annotations

from statistics import median

from specattn_vllm.bench.schema import CellResult
from specattn_vllm.bench.timing import seconds_per_round


def summarise(cell: CellResult) -> CellResult:
    """`cell` with its figures filled in from its samples and counts."""
    if not cell.samples:
        return cell
    speeds = [sample.tokens / sample.seconds for sample in cell.samples]
    rounds = [1000 * seconds_per_round(sample) for sample in cell.samples]
    request_rounds = sum(sample.tokens / sample.tokens_per_round for sample in cell.samples)
    full = cell.counts.get("kv_full")
    return cell.model_copy(
        update={
            "tokens_per_second": round(median(speeds), 2),
            "tokens_per_second_range": (round(min(speeds), 2), round(max(speeds), 2)),
            "milliseconds_per_round": round(median(rounds), 3),
            "milliseconds_per_round_range": (round(min(rounds), 3), round(max(rounds), 3)),
            "tokens_per_round": round(sum(sample.tokens for sample in cell.samples) / request_rounds, 3),
            "kv_read": round(cell.counts["kv_read"] / full, 4) if full else None,
        }
    )

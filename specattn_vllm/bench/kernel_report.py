"""Rows of the kernel benchmark: what a case gave, how it compares, where it ran. JSON and a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass
class Row:
    """One case. Exactly one of ms, error and skipped is set.

    time_ratio is ms over the ms of the row named by `against`; speedup is its inverse. target: {"speedup": at least} or
    {"time_ratio": at most}. share_of_copy is of the measured copy bandwidth; bytes is the floor of kernel_shapes.py,
    and bound_ms what it takes at that bandwidth.
    """

    group: str
    case: str
    shape: str
    parameters: dict[str, Any] = field(default_factory=dict)
    ms: float | None = None
    ms_p10: float | None = None
    ms_p90: float | None = None
    samples: int = 0
    calls: int = 0
    timing: str | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    bound_ms: float | None = None
    against: str | None = None
    time_ratio: float | None = None
    speedup: float | None = None
    target: dict[str, float] | None = None
    target_met: bool | None = None
    relative_error: float | None = None
    note: str | None = None
    error: str | None = None
    skipped: str | None = None

    def add_note(self, text: str) -> None:
        self.note = f"{self.note}; {text}" if self.note else text

    def compare(self, other: Row | None, target: dict[str, float] | None = None) -> None:
        """Set what follows from the time of another row, where both have one."""
        self.target = target
        if other is None or other.ms is None or self.ms is None or min(other.ms, self.ms) <= 0:
            return
        self.against = other.case
        self.time_ratio = round(self.ms / other.ms, 4)
        self.speedup = round(other.ms / self.ms, 3)
        if target is not None:
            self.target_met = all(
                self.speedup >= bound if name == "speedup" else self.time_ratio <= bound
                for name, bound in target.items()
            )


def best(rows: Sequence[Row | None]) -> Row | None:
    """The fastest of the rows that have a time."""
    return min((row for row in rows if row is not None and row.ms is not None), key=lambda row: row.ms, default=None)


def provenance(device, commit: str | None = None) -> dict[str, Any]:
    """Where and with what the numbers were measured; device: torch.device; commit: for a copy that is no repository."""
    import torch

    from specattn_vllm.installed import version_of
    from specattn_vllm.tools.provenance import provenance as machine

    facts: dict[str, Any] = {"commit": None, "gpu": None} | machine(commit)
    facts["versions"] |= {name: found for name in ("xformers", "flashinfer-python") if (found := version_of(name))}
    facts["versions"]["torch"] = torch.__version__
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": chip.name,
            "multiprocessors": chip.multi_processor_count,
            "l2_mib": chip.L2_cache_size >> 20,
            "memory_gib": round(chip.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    else:
        facts |= {"gpu": None, "threads": torch.get_num_threads()}
    return facts


def write_json(path: Path, where: dict[str, Any], settings: dict[str, Any], rows: Sequence[Row], **more: Any) -> None:
    content = {
        "schema": SCHEMA,
        "provenance": where,
        "settings": settings,
        **more,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


COLUMNS = ("case", "shape", "ms", "p10-p90", "MB", "GB/s", "bound", "of copy", "speedup", "against", "target")


def cells(row: Row) -> tuple[str, ...]:
    """The columns of a row that has a time; else case, shape and the reason."""
    if row.ms is None:
        reason = f"ERROR {row.error}" if row.error else f"skipped: {row.skipped}"
        return (row.case, row.shape, reason)
    target = ""
    if row.target:
        name, bound = next(iter(row.target.items()))
        verdict = "?" if row.target_met is None else "met" if row.target_met else "MISSED"
        target = f"{'>=' if name == 'speedup' else '<='} {bound:g}x {'' if name == 'speedup' else 'time '}{verdict}"
    return (
        row.case,
        row.shape,
        f"{row.ms:.4f}",
        f"{row.ms_p10:.4f}-{row.ms_p90:.4f}" if row.ms_p10 is not None else "",
        f"{row.bytes / 1e6:.1f}" if row.bytes else "",
        f"{row.gb_per_s:.0f}" if row.gb_per_s else "",
        f"{row.bound_ms:.4f}" if row.bound_ms else "",
        f"{row.share_of_copy:.0%}" if row.share_of_copy else "",
        f"{row.speedup:.2f}x" if row.speedup else "",
        row.against or "",
        target,
    )


def show(rows: Sequence[Row]) -> None:
    """A rich table on a terminal that has rich; else plain text, which a log takes without wrapping."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            for group in dict.fromkeys(row.group for row in rows):
                drawn = Table(*COLUMNS, "note", title=group, title_justify="left")
                for row in (row for row in rows if row.group == group):
                    line = cells(row)
                    if row.ms is None:
                        drawn.add_row(*line[:2], *[""] * (len(COLUMNS) - 2), line[2])
                    else:
                        drawn.add_row(*line, row.note or "")
                Console().print(drawn)
            return
    print(table(rows))


def table(rows: Sequence[Row]) -> str:
    """All rows as plain text, a block for each group."""
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        mine = [row for row in rows if row.group == group]
        grid = [COLUMNS, *(cells(row) for row in mine)]
        full = [line for line in grid if len(line) == len(COLUMNS)]
        widths = [max(len(line[i]) for line in full) for i in range(len(COLUMNS))]
        widths[:2] = [max(len(line[i]) for line in grid) for i in range(2)]
        lines.append(f"== {group}")
        for line, row in zip(grid, [None, *mine], strict=True):
            lines.append("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=False)).rstrip())
            if row is not None and row.ms is not None and row.relative_error is not None:
                lines[-1] += f"  [err {row.relative_error:.1e}]"
            if row is not None and row.note:
                lines[-1] += f"  ({row.note})"
        lines.append("")
    return "\n".join(lines)

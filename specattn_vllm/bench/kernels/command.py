"""`specattn bench kernels`: the command line, the clock, the table and the JSON."""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from specattn_vllm.bench import grid
from specattn_vllm.installed import UserError, require
from specattn_vllm.tools import models
from specattn_vllm.tools.arguments import add_commit, share
from specattn_vllm.tools.outputs import document, fitted, output_file, write_json
from specattn_vllm.tools.provenance import machine, provenance

if TYPE_CHECKING:
    from specattn_vllm.bench.kernels.inputs import Setup
    from specattn_vllm.bench.kernels.rows import Row

COPY_BYTES = 4 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    told = "rows whose names begin so, e.g. dense,sparse,sketch"
    parser.add_argument("--only", type=lambda text: text.split(","), default=[""], metavar="NAME,...", help=told)
    parser.add_argument("--shape", choices=models.shape_names(with_draft=True), help="[llama-8b-1b; on a CPU demo]")
    told = "[16x32k; on a CPU 2x100]"
    parser.add_argument("--grid", type=grid.parse_grid, metavar="BATCHxCONTEXT,...", help=told)
    parser.add_argument("--kept", type=share, metavar="SHARE", help="of the context [0.1; sketch 0.08]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton's interpreter")
    parser.add_argument("--out", type=output_file, metavar="FILE.json", help="write the results here too")
    add_commit(parser)


def run(args: argparse.Namespace) -> int:
    require(("torch", "triton", "vllm"))
    cuda = args.device == "cuda"
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is loaded
    import torch

    from specattn_vllm.bench.kernels.inputs import Setup
    from specattn_vllm.bench.kernels.rows import ROWS

    rows = [row for row in ROWS if row.name.startswith(tuple(args.only))]
    if nothing := [name for name in args.only if not any(row.name.startswith(name) for row in rows)]:
        raise UserError(f"--only {nothing[0]}: no row begins so; there are {', '.join(row.name for row in ROWS)}")
    if args.list:
        for row in rows:
            print(row.name + (f" (against {row.against})" if row.against else ""))
        return 0
    if cuda and not torch.cuda.is_available():
        raise UserError("no CUDA GPU here; `specattn bench kernels --device cpu` runs tiny shapes in the interpreter")
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtype, shape = (torch.bfloat16, "llama-8b-1b") if cuda else (torch.float32, models.DEMO)
    shape = models.load_shape(args.shape or shape)
    found: dict[str, Any] = {
        "kind": "specattn-bench-kernels",
        "provenance": provenance(args.commit),
        "settings": {"shape": shape.name, "dtype": str(dtype).removeprefix("torch."), "kept": args.kept},
        "copy_gb_per_s": copy_rate(device),
        "rows": [],
    }
    for cell in args.grid or grid.parse_grid("16x32k" if cuda else "2x100"):
        setup = Setup(device, dtype, shape, cell, args.kept)
        for row in rows:
            found["rows"].append(measured(row, setup, str(cell), found))
            if args.out is not None:
                write_json(args.out, found)  # a run that is cut off leaves what it has
    show(found)
    return 1 if any("error" in row for row in found["rows"]) else 0


def measured(row: Row, setup: Setup, cell: str, found: dict[str, Any]) -> dict[str, Any]:
    """What is said of a row. One that fails does not end the others."""
    from specattn_vllm.bench.kernels.rows import Skip

    told: dict[str, Any] = {"name": row.name, "cell": cell}
    try:
        case = row.make(setup)
        ms = milliseconds(case.calls, setup.device.type == "cuda")
    except Skip as reason:
        return told | {"skipped": str(reason)}
    except Exception as error:
        return told | {"error": f"{type(error).__name__}: {error}"[:300]}
    bound = case.nbytes / found["copy_gb_per_s"] / 1e6
    told |= {"ms": ms, "bytes": case.nbytes, "bound_ms": bound}
    for before in found["rows"]:
        if (before["name"], before["cell"]) == (row.against, cell) and "ms" in before:
            told |= {"against": row.against, "speedup": before["ms"] / ms}
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in told.items()}


def milliseconds(calls: Sequence[Callable[[], object]], cuda: bool, graph: bool = True) -> float:
    """Of one call; they take turns, in a CUDA graph as engines run them."""
    turns = itertools.cycle(calls)
    if not cuda:
        times = [time.perf_counter()]
        for call in calls:
            call()
            times.append(time.perf_counter())
        return 1e3 * statistics.median(after - before for before, after in itertools.pairwise(times))
    import torch
    from triton.testing import do_bench, do_bench_cudagraph

    for call in calls:  # compiles, and fills the caches that a capture may not fill
        call()
    torch.cuda.synchronize()  # graphs are captured on another stream
    return (do_bench_cudagraph if graph else do_bench)(lambda: next(turns)(), return_mode="median")


def copy_rate(device: Any) -> float:
    """Gigabytes per second of a large copy by a kernel, read and written: `copy_` may be left to a copy engine, which
    gave 2.8 TB/s on an H200 whose kernels read at 4.4."""
    import torch

    cuda = device.type == "cuda"
    source = torch.ones((COPY_BYTES if cuda else 1 << 22) // 4, device=device)
    target = torch.empty_like(source)
    ms = milliseconds([lambda: torch.add(source, 0.0, out=target)] * 3, cuda, graph=False)
    return round(2 * source.nbytes / ms / 1e6, 1)


def show(found: dict[str, Any]) -> None:
    lines = []
    for row in found["rows"]:
        if "ms" not in row:
            lines.append([row["name"], row["cell"], row.get("error") or f"skipped: {row['skipped']}"])
            continue
        figures = [f"{row['ms']:.4f}", f"{row['bytes'] / 1e6:.1f}", f"{row['bound_ms']:.4f}"]
        faster = f"{row['speedup']:.2f}x {row['against']}" if "speedup" in row else ""
        lines.append([row["name"], row["cell"], *figures, faster])
    below = f"{machine(found['provenance'])}, copies {found['copy_gb_per_s']:,.0f} GB/s"
    print(fitted(document(["row", "cell", "ms", "MB", "bound", "speedup"], lines, below)), end="")

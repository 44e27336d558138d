"""`specattn bench kernels`: how fast the kernels are on one GPU, next to what else would do their work.

Six groups. copy: the memory bandwidth that the others are shares of. verify: attention over a selection against
FlashAttention 3 over everything. draft: attention that hands out its scores. select: mass to bits. prune: bits to page
tables and positions. sketch: the search of method 'sketch' and attention over what it chooses. `--sweep` tries launch
configurations of the two attention kernels instead, and prints the best.

On a CPU it runs the PyTorch references on tiny shapes, to show that it works; those times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import time

from specattn_vllm.bench.kernel_shapes import PAIRS, TINY, Batch, parse_batch
from specattn_vllm.tools.outputs import output_file

GROUPS = ("copy", "verify", "draft", "select", "prune", "sketch")
# The first gets every case, the others those that depend on the shape most.
GRID = ("16x32k", "4x32k", "1x32k", "4x128k", "64x4k")
CPU_GRID = ("2x100",)
KEPT = (0.25, 0.1, 0.05)
QUICK_KEPT = (0.1,)
SECONDS = {"quick": 34.0, "default": 120.0, "sweep": 165.0}
COPY_BYTES = 4 << 30


def _grid(text: str) -> list[Batch]:
    try:
        return [parse_batch(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _only(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in GROUPS]:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)!r}, wanted some of {','.join(GROUPS)}")
    return names


def _group(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 16:  # with the 7 rows of a first step, a tile of 128
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted 1 to 16 query heads for each KV head")
    return number


def _kept(text: str) -> list[float]:
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = []
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted shares of the context such as 0.25,0.1,0.05")
    return fractions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=output_file, help="write the results here too, as JSON")
    parser.add_argument(
        "--only", type=_only, default=list(GROUPS), help=f"some of {','.join(GROUPS)} (all; copy is always measured)"
    )
    parser.add_argument("--quick", action="store_true", help="the first shape and the main cases only")
    parser.add_argument("--sweep", action="store_true", help="try launch configurations, print the best as constants")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of caches and queries")
    parser.add_argument("--shape", choices=tuple(PAIRS), help="target and draft (both pairs on the first shape)")
    parser.add_argument("--group", type=_group, help="query heads for each KV head of the draft (those of its shape)")
    parser.add_argument("--grid", type=_grid, help=f"requests x context, the first in full ({','.join(GRID)})")
    parser.add_argument("--kept", type=_kept, help=f"kept shares ({','.join(map(str, KEPT))}; sketch 0.08)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: references on tiny shapes")
    parser.add_argument("--commit", help="what to record as the commit, where the package is in no repository")
    parser.add_argument("--seconds", type=float, help="skip what would begin later (120; quick 34; sweep 165)")


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    from specattn_vllm.installed import UserError, require

    require(("torch",))
    import torch

    from specattn_vllm.bench import kernel_report as report
    from specattn_vllm.bench.kernel_bench import Bench

    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("no CUDA GPU here; `specattn bench kernels --device cpu --quick` times the references")
        device = torch.device("cuda", torch.cuda.current_device())
    seconds = args.seconds or SECONDS["sweep" if args.sweep else "quick" if args.quick else "default"]
    dtype = getattr(torch, args.dtype) if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    bench = Bench(device, dtype, quick=args.quick, seconds=seconds, started=started)
    where = report.provenance(device, args.commit)
    settings = {
        name: [str(v) for v in value] if isinstance(value, list) else value
        for name, value in vars(args).items()
        if isinstance(value, (list, str, bool, float, int)) or value is None
    } | {"dtype": str(dtype).removeprefix("torch."), "seconds": seconds}
    more: dict[str, object] = {}

    def save() -> None:
        # After every group: a run that is cut off leaves what it has.
        if args.out is not None:
            more["copy_gb_per_s"] = bench.copy_gb_per_s
            more["seconds_taken"] = round(time.monotonic() - started, 1)
            report.write_json(args.out, where, settings, bench.rows, **more)

    # Always: shares are of it.
    _guarded(bench, "copy", "", _copy, bench)
    if args.sweep:
        _sweep(bench, args, more, save)
    else:
        _cases(bench, args, save)
    save()
    report.show(bench.rows)
    measured, errors, skipped = (
        sum(bool(getattr(row, name)) for row in bench.rows) for name in ("ms", "error", "skipped")
    )
    print(
        f"{where['gpu'] or 'CPU'}, {settings['dtype']}, {where['date']}, commit {where['commit']}: "
        f"{measured} measured, {errors} errors, {skipped} skipped, {time.monotonic() - started:.0f} s"
        + (f"; written to {args.out}" if args.out else "")
    )


def _batches(bench, args: argparse.Namespace) -> list[Batch]:
    default = GRID if bench.cuda else CPU_GRID
    grid = args.grid or [parse_batch(text) for text in default]
    return grid[:1] if args.quick else grid


def _pairs(bench, args: argparse.Namespace) -> list:
    if not bench.cuda:
        pairs = [TINY]
    elif args.shape:
        pairs = [PAIRS[args.shape]]
    else:
        pairs = list(PAIRS.values())[: 1 if args.quick else None]
    if args.group is None:
        return pairs
    return [p._replace(draft=p.draft._replace(query=p.draft.kv * args.group)) for p in pairs]


def _cases(bench, args: argparse.Namespace, save) -> None:
    """The first shape in full; then the others, drafting last, because it compiles most: what comes after the time
    limit is left out."""
    from specattn_vllm.bench import kernel_draft, kernel_select, kernel_sketch, kernel_verify

    fractions = args.kept or list(QUICK_KEPT if args.quick else KEPT)
    pairs = _pairs(bench, args)
    first, *others = _batches(bench, args)
    full = not args.quick

    def verify(batch: Batch, full: bool) -> None:
        _guarded(bench, "verify", batch, kernel_verify.verify, bench, batch, pairs[0], fractions, full)

    def draft(batch: Batch, pair, full: bool) -> None:
        _guarded(bench, "draft", batch, kernel_draft.draft, bench, batch, pair, full)

    def select_and_prune(batch: Batch, full: bool) -> None:
        selected = pruned = None
        if "select" in args.only:
            selected = _guarded(bench, "select", batch, kernel_select.select, bench, batch, pairs[0], full)
        if "prune" in args.only:
            pruned = _guarded(bench, "prune", batch, kernel_select.prune, bench, batch, pairs[0], full)
        if selected and pruned:
            kernel_select.round_cost(bench, batch, selected, pruned)

    def sketch(batch: Batch) -> None:
        shares = args.kept or [kernel_sketch.KEPT]
        _guarded(bench, "sketch", batch, kernel_sketch.search, bench, batch, pairs[0], shares)

    steps = [("verify", verify, first, True)]
    steps += [("draft", draft, first, pair, full) for pair in pairs]
    steps += [("", select_and_prune, first, full)]
    steps += [("sketch", sketch, first)]
    steps += [("verify", verify, batch, False) for batch in others]
    steps += [("", select_and_prune, batch, False) for batch in others]
    steps += [("sketch", sketch, batch) for batch in others]
    steps += [("draft", draft, batch, pairs[0], False) for batch in others]
    for group, step, *arguments in steps:
        if not group or group in args.only:
            step(*arguments)
            save()


def _sweep(bench, args: argparse.Namespace, more: dict[str, object], save) -> None:
    from specattn_vllm.bench import kernel_sweep

    lines: list[str] = []
    more["constants"] = lines
    for batch in _batches(bench, args)[: 1 if bench.cuda and args.grid is None else None]:
        _guarded(bench, "sweep", batch, kernel_sweep.sweep, bench, batch, _pairs(bench, args), args.only, lines, save)


def _guarded(bench, group: str, shape: object, function, *arguments):
    """Run a group; what fails outside its cases, such as running out of memory for its inputs, becomes a row."""
    if bench.lost:
        return None
    try:
        return function(*arguments)
    except Exception as error:
        from specattn_vllm.bench.kernel_report import Row

        bench.rows.append(Row(group, "inputs", str(shape), error=f"{type(error).__name__}: {error}"[:300]))
        return None
    finally:
        bench.tidy()


def _copy(bench) -> None:
    """Bandwidth of a large copy, bytes read and written.

    By a kernel: `copy_` is left to a copy engine inside a CUDA graph, and gave 2.8 TB/s on an H200 whose kernels read
    at 4.4 TB/s.
    """
    import torch

    size = COPY_BYTES if bench.cuda else 1 << 22
    source = torch.empty(size // 4, dtype=torch.float32, device=bench.device).normal_()
    target = torch.empty_like(source)
    calls = [lambda: torch.add(source, 0.0, out=target)]
    row = bench.measure("copy", "copy by a kernel", f"{size >> 20} MiB", lambda: calls, 2 * size)
    bench.copy_gb_per_s = row.gb_per_s
    row.share_of_copy = 1.0 if row.gb_per_s else None

"""The command line of `specattn bench`. Loads torch, vLLM, rich and matplotlib where they are used, if at all."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from specattn_vllm.bench import grid
from specattn_vllm.bench.arguments import engines_arguments, table_arguments
from specattn_vllm.bench.kernels import command as kernels
from specattn_vllm.installed import UserError, require
from specattn_vllm.tools import models
from specattn_vllm.tools.interrupts import ended_as_interrupted, resumed, status_of

if TYPE_CHECKING:
    from specattn_vllm.bench.jobs import Request
    from specattn_vllm.bench.schema import EngineResult, Job, Report


def request_of(args: argparse.Namespace) -> Request:
    from specattn_vllm.bench.jobs import Request
    from specattn_vllm.tools.provenance import has_gpu

    device = args.device
    if device == "auto":
        device = "cuda" if (args.list and args.shape != models.DEMO) or has_gpu() else "cpu"
        if device == "cpu" and args.shape != models.DEMO:
            raise UserError(
                f"no NVIDIA GPU was found, and {args.shape} is too large for a CPU: try "
                "`specattn bench --shape demo --grid 2x256 --output-tokens 16`, or insist with --device cpu"
            )
    draft_tokens, lengths = dict(args.draft_tokens), dict(args.acceptance_length)
    counts = [("draft_tokens", n, 1) for n in draft_tokens.values()]
    counts += [(name, getattr(args, name), 1) for name in ("output_tokens", "repeats", "max_warmups")]
    for name, value, least in (*counts, ("seed", args.seed, 0)):
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least {least}")
    return Request(
        shape=models.load_shape(args.shape),
        grid=args.grid,
        modes=args.modes,
        kept=args.kept,
        device=device,
        draft_tokens=draft_tokens.pop("", grid.DRAFT_TOKENS),
        acceptance_lengths=lengths.pop("", (grid.ACCEPTANCE_LENGTH,)),
        draft_tokens_of=draft_tokens,
        acceptance_lengths_of=lengths,
        output_tokens=args.output_tokens,
        repeats=args.repeats,
        max_warmups=args.max_warmups,
        max_num_batched_tokens=args.max_num_batched_tokens,
        gpu_memory_utilization=args.gpu_memory_utilization,
        capture_sizes=args.cudagraph_capture_sizes,
        options=dict(args.option),
        engine_options=dict(args.engine_argument),
        seed=args.seed,
    )


def planned_jobs(request: Request) -> list[Job]:
    from specattn_vllm.bench.jobs import job_name, make_jobs

    try:
        jobs = make_jobs(request)
    except ValueError as error:
        raise UserError(str(error)) from None
    for job in jobs:
        length, most = job.acceptance_length, job.draft_tokens + 1
        if length is not None and not 1 <= length <= most:
            raise UserError(
                f"--acceptance-length {length:g} for {job.name}: between 1 and --draft-tokens + 1 = {most}, or 0"
            )
    known = {name for job in jobs for name in (job_name(job.mode, job.kept), job.mode)}
    named = {"draft-tokens": request.draft_tokens_of, "acceptance-length": request.acceptance_lengths_of}
    for flag, name in ((flag, name) for flag, given in named.items() for name in given):
        if name not in known:
            raise UserError(f"--{flag} {name}: no such engine in this run (--modes, --kept)")
    return jobs


def engines(args: argparse.Namespace) -> int:
    request = request_of(args)
    jobs = planned_jobs(request)
    if args.list:
        for job in jobs:
            print(describe(job))
        return 0
    require(("vllm", "rich", *(("matplotlib",) if args.plot else ())))
    from rich.console import Console

    from specattn_vllm.bench import runner, terminal
    from specattn_vllm.bench.schema import Report
    from specattn_vllm.tools.provenance import provenance

    report = Report(provenance=provenance(args.commit), settings=request.settings(), engines=[])
    earlier = earlier_engines(args, report)
    console = Console()
    folder = args.out.with_suffix(".logs")
    interrupt = None
    try:
        with ended_as_interrupted(), terminal.board(jobs, console) as board:
            runner.run_all(
                jobs,
                report,
                args.out,
                folder,
                args.engine_timeout,
                earlier,
                keep_going=args.keep_going,
                rerun=args.rerun,
                gpus=args.gpus,
                watch=board.watch,
                done=board.done,
            )
    except KeyboardInterrupt as found:
        interrupt = found
    terminal.show(report, console)
    console.print(f"{args.out} (table for documents: specattn bench table {args.out}); logs in {folder}")
    if interrupt is not None:
        console.out(f"interrupted; this goes on with it: {resumed('--resume')}", highlight=False)
        return status_of(interrupt)
    if args.plot:
        draw(report, args.plot)
    names = {job.name for job in jobs}
    ran = {engine.name for engine in report.engines if engine.status == "ok" and engine.name in names}
    return 0 if ran == names else 1


def earlier_engines(args: argparse.Namespace, report: Report) -> dict[str, EngineResult]:
    from specattn_vllm.bench import runner

    if args.resume or args.rerun:
        try:
            return runner.earlier_engines(args.out, report)
        except ValueError as error:
            raise UserError(f"{error}: give another --out, or --overwrite instead") from None
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} is there already: --resume goes on with it, --overwrite starts anew")
    return {}


def describe(job: Job) -> str:
    """A job as `--list` shows it."""
    cells = ", ".join(f"{cell.name} ({cell.prompt_tokens:,} tokens a prompt)" for cell in job.cells)
    variables = " ".join(f"{k}={v!r}" if v is not None else f"without {k}" for k, v in job.environment.items())
    lines = [
        f"{job.name}",
        f"  cells: {cells}",
        f"  {job.generated_tokens} tokens a request and generation: 1 or more to warm up, {job.repeats} to measure",
        f"  environment: {variables}",
        f"  vllm.LLM: {json.dumps(job.engine_arguments)}",
    ]
    return "\n".join(lines)


def table(args: argparse.Namespace) -> int:
    from specattn_vllm.bench import report as reports
    from specattn_vllm.bench.schema import Report

    try:
        results = json.loads(args.file.read_text())
        report = Report.model_validate(results)
    except (OSError, ValueError) as error:
        raise UserError(f"{args.file} is no report of `specattn bench`: {str(error).splitlines()[0]}") from None
    print(reports.markdown(results), end="")
    if args.details:
        print("\n" + reports.details(results), end="")
    if args.plot:
        require(("matplotlib",))
        draw(report, args.plot)
    return 0


def draw(report: Report, path: Path) -> None:
    from specattn_vllm.bench import plot

    plot.save(report, path)


# Name -> what runs it, its arguments, its help.
PARTS = {
    "engines": (engines, engines_arguments, "decoding speed of whole engines, side by side (the default)"),
    "kernels": (kernels.run, kernels.add_arguments, "single kernels, next to what else would do their work"),
    "table": (table, table_arguments, "the table of a report, as Markdown"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, (_, arguments, text) in PARTS.items():
        arguments(parts.add_parser(name, help=text, description=text))
    own_help = parser.format_help

    def format_help() -> str:
        """With the options of the part that runs where none is named, which are what is looked for here."""
        engines = parts.choices["engines"].format_help()
        return f"{own_help()}\nWithout a PART, options are those of `engines`:\n\n{engines}"

    parser.format_help = format_help


def run(args: argparse.Namespace) -> int | None:
    return PARTS[args.part][0](args)

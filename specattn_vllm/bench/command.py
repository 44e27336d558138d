"""The command line of `specattn bench`. Loads torch, vLLM and matplotlib where they are used, if at all."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from specattn_vllm.bench import grid, jobs
from specattn_vllm.bench.kernels import command as kernels
from specattn_vllm.bench.serve import command as serve
from specattn_vllm.installed import UserError, require
from specattn_vllm.tools import models
from specattn_vllm.tools.arguments import (
    add_commit,
    add_engine_argument,
    add_gpus,
    add_running,
    at_least,
    parse_option,
    share,
)
from specattn_vllm.tools.outputs import output_file


def engines_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument("--shape", default="llama-8b-1b", choices=models.shape_names(), help="[%(default)s]")
    what.add_argument(
        "--grid",
        type=grid.parse_grid,
        default="16x32k,4x32k,1x32k,4x128k",
        metavar="BATCHxCONTEXT,...",
        help="requests at a time, and tokens of prompt of each; k is 1024 [%(default)s]",
    )
    what.add_argument(
        "--modes",
        type=jobs.parse_list(jobs.parse_mode),
        default=",".join(jobs.DEFAULT_MODES),
        metavar="MODE,...",
        help="of stock vLLM: plain, draft-v2, draft-v1, eagle (a head of EAGLE-3's shape); of this plugin: dense, "
        "specattn, sketch (with a draft model), sketch-eagle, sketch-alone (no speculation), vegas (the target drafts "
        "for itself) [%(default)s]",
    )
    what.add_argument(
        "--kept",
        type=jobs.parse_list(share),
        default="0.25,0.1,0.05",
        metavar="SHARE,...",
        help="shares of the context that modes of this plugin but dense keep, an engine each [%(default)s]",
    )
    what.add_argument(
        "--draft-tokens",
        type=jobs.parse_for_mode(at_least(1)),
        action="append",
        default=[],
        metavar="[MODE:]K",
        help=f"drafted a round, in all modes or in one; may be repeated [{jobs.DRAFT_TOKENS}]",
    )
    what.add_argument(
        "--acceptance-length",
        type=jobs.parse_for_mode(jobs.parse_list(float)),
        action="append",
        default=[],
        metavar="[MODE:]A,...",
        help="mean tokens of a round, by vLLM's synthetic acceptance, an engine each, of all modes or of one; may be "
        f"repeated [{jobs.ACCEPTANCE_LENGTH:g}]",
    )
    what.add_argument(
        "--option",
        type=parse_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the plugin for its modes that can use it, e.g. min_tokens=64, or for one, e.g. "
        "vegas:dilation=0; may be repeated",
    )
    what.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="[%(default)s]")

    how = parser.add_argument_group("how")
    for name, default, told in (
        ("output-tokens", 64, "about so many tokens of every request are timed in a generation"),
        ("repeats", 3, "timed generations"),
        ("max-warmups", 5, "generations before them at most; fewer where two in turn agree within 3%%"),
    ):
        how.add_argument(f"--{name}", type=at_least(1), default=default, metavar="N", help=f"{told} [%(default)s]")
    how.add_argument("--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE", help="[%(default)s]")
    add_engine_argument(how, "for every mode")

    run = parser.add_argument_group("running")
    add_running(run, "engines", Path("specattn-bench.json"))
    run.add_argument("--plot", type=output_file, metavar="FILE.png", help="also draw it")
    add_gpus(run, "engines")
    add_commit(run)


def table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="also draw it")


def engines(args: argparse.Namespace) -> int:
    from specattn_vllm.tools.provenance import has_gpu, provenance

    shape = models.load_shape(args.shape)
    if args.device == "auto":
        args.device = "cuda" if (args.list and not shape.has_weights) or has_gpu() else "cpu"
        if args.device == "cpu" and not shape.has_weights:
            raise UserError(
                f"no NVIDIA GPU was found, and {args.shape} is too large for a CPU: try "
                "`specattn bench --shape demo --grid 2x256 --output-tokens 16`, or insist with --device cpu"
            )
    try:
        wanted = jobs.make_jobs(args, shape)
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.list:
        for job in wanted:
            cells = ", ".join(f"{cell.name} ({cell.prompt_tokens:,} tokens a prompt)" for cell in job.cells)
            variables = " ".join(f"{name}={value!r}" for name, value in job.environment.items())
            print(f"{job.name}\n  cells: {cells}\n  environment: {variables}")
            print(f"  vllm.LLM: {json.dumps(job.engine_arguments)}")
        return 0
    require(("vllm", *(("matplotlib",) if args.plot else ())))
    from specattn_vllm.bench import report as reports
    from specattn_vllm.bench import runner
    from specattn_vllm.bench.schema import Report

    report = Report(provenance=provenance(args.commit), settings=jobs.settings_of(args, shape), engines=[])
    status = runner.carry_out(wanted, report, args, reports.markdown, gpus=args.gpus)
    if args.plot and status in (0, 1):
        from specattn_vllm.bench.plot import draw

        draw(report).savefig(args.plot, dpi=160)
    return status


def table(args: argparse.Namespace) -> None:
    from specattn_vllm.bench import report as reports
    from specattn_vllm.bench.schema import Report, read
    from specattn_vllm.bench.serve import report as serve_reports
    from specattn_vllm.bench.serve.schema import ServeReport

    report = read(args.file, Report, ServeReport)
    print((reports if isinstance(report, Report) else serve_reports).markdown(report), end="")
    if args.plot:
        if not isinstance(report, Report):
            raise UserError(f"--plot: {args.file} is of servers; only reports of `specattn bench engines` are drawn")
        require(("matplotlib",))
        from specattn_vllm.bench.plot import draw

        draw(report).savefig(args.plot, dpi=160)


# Name -> what runs it, its arguments, its help.
PARTS = {
    "engines": (engines, engines_arguments, "decoding speed of whole engines, side by side (the default)"),
    "serve": (serve.run, serve.add_arguments, "servers under load, as clients see them, next to stock vLLM's"),
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

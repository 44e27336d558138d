"""The command line of `specattn bench`. Loads torch, vLLM and matplotlib where they are used, if at all."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from specattn_vllm.bench import grid, jobs
from specattn_vllm.bench.kernels import command as kernels
from specattn_vllm.bench.serve import command as serve
from specattn_vllm.installed import UserError, require
from specattn_vllm.tools import models, outputs
from specattn_vllm.tools.arguments import add_engine, add_numbers, add_running, parse_list
from specattn_vllm.tools.outputs import output_file

CELLS = "requests at a time, and tokens of prompt of each; k is 1024 [%(default)s]"
MODES = (
    "of stock vLLM: plain, draft-v2, draft-v1, eagle (a head of EAGLE-3's shape); of this plugin: dense, specattn, "
    "sketch (with a draft model), sketch-eagle, sketch-alone (no speculation), vegas (the target drafts for itself)"
)
LENGTHS = "mean tokens of a round, an engine for each between commas, by vLLM's synthetic acceptance"


def engines_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument("--shape", default="llama-8b-1b", choices=models.shape_names(), help="[%(default)s]")
    cells = "16x32k,4x32k,1x32k,4x128k"
    what.add_argument("--grid", type=grid.parse_grid, default=cells, metavar="BATCHxCONTEXT,...", help=CELLS)
    jobs.add_modes(what, jobs.DEFAULT_MODES, MODES, "0.25,0.1,0.05", parse_list(float), LENGTHS)

    how = parser.add_argument_group("how")
    add_numbers(
        how,
        ("output-tokens", 64, 1, "about so many tokens of every request are timed in a generation"),
        ("repeats", 3, 1, "timed generations"),
        ("max-warmups", 5, 1, "generations before them at most; fewer where two in turn agree within 3%%"),
    )
    how.add_argument("--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE", help="[%(default)s]")
    add_engine(how, "for every mode")

    run = parser.add_argument_group("running")
    run.add_argument("--plot", type=output_file, metavar="FILE.png", help="also draw it")
    add_running(run, "engines", Path("specattn-bench.json"))


def table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="also draw it")


def engines(args: argparse.Namespace) -> int:
    shape = models.load_shape(args.shape)
    args.device = jobs.device(args, shape, "--shape demo --grid 2x256 --output-tokens 16")
    try:
        wanted = jobs.make_jobs(args, shape)
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.list:
        for job in wanted:
            cells = ", ".join(f"{cell.name} ({cell.prompt_tokens:,} tokens a prompt)" for cell in job.cells)
            print(f"{job.name}\n  cells: {cells}\n  {job.listed()}\n  vllm.LLM: {json.dumps(job.engine_arguments)}")
        return 0
    require(("vllm", *(("matplotlib",) if args.plot else ())))
    from specattn_vllm.bench import report as reports
    from specattn_vllm.bench import runner
    from specattn_vllm.bench.schema import Report
    from specattn_vllm.tools.provenance import provenance

    report = Report(provenance=provenance(args.commit), settings=jobs.settings_of(args, shape), engines=[])
    status = runner.carry_out(wanted, report, args, reports.markdown)
    if args.plot and status in (0, 1):
        reports.save(report, args.plot)
    return status


def table(args: argparse.Namespace) -> None:
    from specattn_vllm.bench import report as reports
    from specattn_vllm.bench.schema import Report
    from specattn_vllm.bench.serve import report as serve_reports
    from specattn_vllm.bench.serve.schema import ServeReport

    report = outputs.read(args.file, "specattn bench", Report, ServeReport)
    with outputs.shown(args.file):
        made = (reports if isinstance(report, Report) else serve_reports).markdown(report)
    print(outputs.fitted(made), end="")
    if args.plot:
        if not isinstance(report, Report):
            raise UserError(f"--plot: {args.file} is of servers; only reports of `specattn bench engines` are drawn")
        require(("matplotlib",))
        reports.save(report, args.plot)


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

"""The arguments of `specattn bench engines` and `specattn bench table`. Standard library only."""

from __future__ import annotations

import argparse
from pathlib import Path

from specattn_vllm.bench import grid
from specattn_vllm.tools import models
from specattn_vllm.tools.arguments import add_commit, add_engine_argument, add_gpus, checked, parse_option
from specattn_vllm.tools.outputs import output_file

DEFAULT_GRID = "16x32k,4x32k,1x32k,4x128k"
DEFAULT_OUT = Path("specattn-bench.json")


def engines_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument("--shape", default="llama-8b-1b", choices=models.shape_names(), help="[%(default)s]")
    what.add_argument(
        "--grid",
        type=checked(grid.parse_grid),
        default=DEFAULT_GRID,
        metavar="BATCHxCONTEXT,...",
        help="requests at a time, and tokens of prompt of each; k is 1024 [%(default)s]",
    )
    what.add_argument(
        "--modes",
        type=checked(grid.parse_modes),
        default=",".join(grid.DEFAULT_MODES),
        metavar="MODE,...",
        help="of stock vLLM: plain, draft-v2, draft-v1, eagle (a head of EAGLE-3's shape); of this plugin: dense, "
        "sparse-draft, specattn, sketch (with a draft model), sketch-eagle, sketch-alone (no speculation), and where "
        "the target drafts for itself: vegas, streamingllm [all but the last two, eagle, sketch-eagle, sketch-alone]",
    )
    what.add_argument(
        "--kept",
        type=checked(grid.parse_fractions),
        default="0.25,0.1,0.05",
        metavar="SHARE,...",
        help="shares of the context that specattn, the sketch modes and the last two keep, an engine each "
        "[%(default)s]",
    )
    what.add_argument(
        "--draft-tokens",
        type=checked(grid.parse_for_mode(int)),
        action="append",
        default=[],
        metavar="[MODE:]K",
        help=f"drafted a round, in all modes or in one; may be repeated [{grid.DRAFT_TOKENS}]",
    )
    what.add_argument(
        "--acceptance-length",
        type=checked(grid.parse_for_mode(grid.parse_lengths)),
        action="append",
        default=[],
        metavar="[MODE:]A,...",
        help="mean tokens of a round, by vLLM's synthetic acceptance, an engine each; of all modes, one (vegas:4), or "
        "one of its kept shares ('vegas 5%%:3.2'); may be repeated; 0: what the models agree on "
        f"[{grid.ACCEPTANCE_LENGTH:g}]",
    )
    what.add_argument(
        "--option",
        type=checked(parse_option),
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the plugin for its modes that can use it, e.g. min_tokens=64, or for one, e.g. "
        "specattn:sparse_draft=true; may be repeated",
    )
    what.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="[%(default)s]")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--output-tokens",
        type=int,
        default=64,
        metavar="N",
        help="about so many tokens of every request are timed in a generation [%(default)s]",
    )
    how.add_argument("--repeats", type=int, default=3, metavar="N", help="timed generations [%(default)s]")
    how.add_argument(
        "--max-warmups",
        type=int,
        default=5,
        metavar="N",
        help="generations before them at most; fewer where two in turn agree within 3%% [%(default)s]",
    )
    how.add_argument(
        "--cudagraph-capture-sizes",
        type=checked(grid.parse_sizes),
        metavar="TOKENS,...",
        help="default: only those that the grid's batches need, which shortens the start",
    )
    how.add_argument("--max-num-batched-tokens", type=int, default=8192, metavar="N", help="[%(default)s]")
    how.add_argument("--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE", help="[%(default)s]")
    add_engine_argument(how, "for every mode")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts [%(default)s]")

    run = parser.add_argument_group("running")
    run.add_argument(
        "--out",
        type=output_file,
        default=DEFAULT_OUT,
        metavar="FILE.json",
        help="written after every engine; logs go into a folder beside it [%(default)s]",
    )
    run.add_argument("--plot", type=output_file, metavar="FILE.png", help="also draw it")
    run.add_argument("--list", action="store_true", help="show what would run, with every argument, and stop")
    run.add_argument("--resume", action="store_true", help="go on with --out: engines measured there are not run again")
    run.add_argument("--rerun", action="store_true", help="the same, but engines named now run again if measured")
    run.add_argument("--overwrite", action="store_true", help="throw away what --out holds")
    add_gpus(run, "engines")
    run.add_argument(
        "--keep-going",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on after an engine that failed (the default; the exit status says so in any case)",
    )
    run.add_argument(
        "--engine-timeout",
        type=float,
        default=900.0,
        metavar="S",
        help="seconds that an engine may take in all [%(default)s]",
    )
    add_commit(run)


def table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--details", action="store_true", help="also a table of what the speeds are made of")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="also draw it")

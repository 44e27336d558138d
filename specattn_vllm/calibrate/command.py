"""The command line of `specattn calibrate`. Imports torch and transformers only when they are used."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from specattn_vllm.installed import UserError, require
from specattn_vllm.methods import METHODS
from specattn_vllm.tools.arguments import add_pair, share
from specattn_vllm.tools.interrupts import ended_as_interrupted, resumed, status_of
from specattn_vllm.tools.models import DEMO
from specattn_vllm.tools.outputs import output_file

BUDGET = 0.125
"""As option `ratio` has it by default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("the pair and the text")
    add_pair(what)
    text = "UTF-8, similar to the text that will be served, read in this order; the demo pair has its own"
    what.add_argument("--text", type=Path, nargs="+", metavar="FILE", help=text)
    what.add_argument("--window", type=int, default=4096, metavar="N", help="tokens per window [%(default)s]")
    what.add_argument("--windows", type=int, default=16, metavar="N", help="number of windows at most [%(default)s]")
    layers = parser.add_argument_group("layers and heads")
    method = "the method that will use the map; sts: with a head map [%(default)s]"
    layers.add_argument("--method", choices=("specattn", "sts"), default="specattn", help=method)
    criterion = (
        "by what draft layers and heads are chosen. retained: the target's attention on the tokens that they choose. "
        "papers: the similarity of their attention, KL divergence for layers and Jaccard index for heads [%(default)s]"
    )
    layers.add_argument("--criterion", choices=("retained", "papers"), default="retained", help=criterion)
    budget = f"share of the tokens that a draft layer or head chooses, for `retained` [{BUDGET}]"
    layers.add_argument("--budget", type=share, metavar="SHARE", help=budget)
    dense = "number of first target layers that are dense [%(default)s]"
    layers.add_argument("--dense-layers", type=int, default=0, metavar="N", help=dense)
    ranks = "map heads within each of N tensor-parallel ranks (sts) [1]"
    layers.add_argument("--ranks", type=int, metavar="N", help=ranks)
    layers.add_argument("--queries", type=int, default=64, metavar="N", help="rows compared per window [%(default)s]")
    run = parser.add_argument_group("running")
    run.add_argument("--out", type=output_file, required=True, metavar="FILE.json", help="the map")
    run.add_argument("--overwrite", action="store_true", help="replace --out, and discard an interrupted run")
    run.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    run.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="[float32 on a CPU, else bfloat16]")
    run.add_argument("--seed", type=int, default=0, help="which rows are compared [%(default)s]")


def state_file(out: Path) -> Path:
    """The file in which an interrupted run keeps its measurements, beside the map."""
    return out.with_name(out.name + ".state")


def check(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that are invalid, alone or together."""
    for name, least in {"window": 64, "windows": 1, "queries": 1, "ranks": 1, "dense_layers": 0, "seed": 0}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    if args.ranks is not None and "heads" not in METHODS[args.method].map_keys:
        raise UserError("--ranks is for --method sts: maps for specattn have no heads")
    if args.criterion == "retained":
        args.budget = args.budget or BUDGET
    elif args.budget is not None:
        raise UserError("--budget is for --criterion retained: the papers compare attention without a budget")
    if args.queries > (most := args.window - args.window // 16):
        raise UserError(f"--queries {args.queries}: a window of {args.window} has {most}")
    if args.text is None and (args.target, args.draft) != (DEMO, DEMO):
        raise UserError("--text: give files of text like the text to be served; only the demo pair brings its own")
    # If both files exist, an interrupted run was about to overwrite an earlier map: it is resumed.
    if args.out.exists() and not args.overwrite and not state_file(args.out).exists():
        raise UserError(f"--out {args.out} exists: give another, or --overwrite")


def run(args: argparse.Namespace) -> int:
    check(args)
    require(("torch", "transformers", "rich"))
    from specattn_vllm.calibrate.runner import calibrate

    try:
        with ended_as_interrupted():
            found = calibrate(args, state_file(args.out))
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted; run this to go on from {state_file(args.out)}: {resumed()}")
        return status_of(interrupt)
    print(summary(args.out, found))
    return 0


def summary(out: Path, found: dict[str, Any]) -> str:
    layers = " ".join("-" if layer is None else str(layer) for layer in found["layers"])
    lines = [f"{out}: '-' is a dense layer", f"  draft layer per target layer: {layers}"]
    if found["heads"] is not None:
        heads = " ".join("-" if row is None else ",".join(map(str, row)) for row in found["heads"])
        lines.append(f"  draft KV head per target KV head: {heads}")
    return "\n".join(lines)

"""Arguments of `specattn calibrate`, and which of them make sense. Loads no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from specattn_vllm.installed import UserError
from specattn_vllm.tools.arguments import add_pair
from specattn_vllm.tools.models import DEMO
from specattn_vllm.tools.outputs import output_file

PATHS = ("monotone", "free")
RETAINED = "retained"
QUERIES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("the pair and the text")
    add_pair(what)
    what.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE",
        help="UTF-8, like what will be served, read in this order; the demo pair brings its own",
    )  # fmt: skip
    what.add_argument("--window", type=int, default=4096, metavar="N", help="tokens at a time [%(default)s]")
    what.add_argument("--windows", type=int, default=16, metavar="N", help="how many at most [%(default)s]")
    layers = parser.add_argument_group("layers and heads")
    layers.add_argument(
        "--method", choices=("specattn", "sts"), default="specattn", help="what the map is for; sts: with a head map"
    )
    layers.add_argument(
        "--similarity", choices=(RETAINED, "kl", "jaccard"), default=RETAINED,
        help="what a draft layer, and with sts a draft head, is chosen by: the target's attention that its choice "
        "retains at the budget, or how alike both attend (kl: heads by jaccard) [%(default)s]",
    )  # fmt: skip
    layers.add_argument(
        "--path", choices=PATHS,
        help="which layer maps are allowed: never back in depth, or any [free with --similarity retained, else "
        "monotone]",
    )  # fmt: skip
    layers.add_argument(
        "--dense-layers", type=int, default=0, metavar="N",
        help="first target layers that read everything [%(default)s]",
    )  # fmt: skip
    layers.add_argument(
        "--ranks", type=int, metavar="N", help="map heads within each of N tensor-parallel ranks (sts) [1]"
    )
    layers.add_argument(
        "--queries", type=int, metavar="N",
        help=f"rows compared a window, where it is not by what is retained [{QUERIES}]",
    )  # fmt: skip
    copying = parser.add_argument_group("which layers copy")
    copying.add_argument(
        "--induction", choices=("auto", "none"), default="auto",
        help="name layers that keep more of their attention at the budget if what follows earlier occurrences of the "
        "round's tokens counts more; or none [%(default)s]",
    )  # fmt: skip
    shares = parser.add_argument_group("how much each layer reads")
    shares.add_argument(
        "--shares", choices=("kl", "mass", "none"), default="kl",
        help="divide the budget by what pruning one layer does to the target's output; by the attention that it loses, "
        "which takes no further passes; or not at all [%(default)s]",
    )  # fmt: skip
    shares.add_argument(
        "--budget", type=float, metavar="SHARE",
        help="of the context, layers' mean [`ratio` of a server of the method: 0.25, sts 0.1]",
    )  # fmt: skip
    shares.add_argument(
        "--retain", type=float, metavar="SHARE",
        help="of the layers' attention, their mean: the budget that is divided is the least that retains so much",
    )  # fmt: skip
    shares.add_argument(
        "--dense-above", type=float, metavar="NATS",
        help="layers that cost more than this at the budget, alone, read everything (--shares kl)",
    )  # fmt: skip
    shares.add_argument("--rounds", type=int, default=20, metavar="N", help="verifications a window [%(default)s]")
    shares.add_argument("--draft-tokens", type=int, default=4, metavar="K", help="drafted a round [%(default)s]")
    run = parser.add_argument_group("running")
    run.add_argument("--out", type=output_file, required=True, metavar="FILE.json", help="the map")
    run.add_argument("--picture", type=output_file, metavar="FILE.png", help="also draw what was measured")
    run.add_argument("--overwrite", action="store_true", help="throw away what --out holds or an earlier run left")
    run.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    run.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="[float32 on a CPU, else bfloat16]")
    run.add_argument("--seed", type=int, default=0, help="which rows are compared [%(default)s]")


def state_file(out: Path) -> Path:
    """What a run that was cut off has left, beside the map that is to be written."""
    return out.with_name(out.name + ".state")


def maps_heads(args: argparse.Namespace) -> bool:
    """Whether heads are mapped too."""
    from specattn_vllm import methods

    return methods.find(args.method).per_head


def fill_in(args: argparse.Namespace) -> None:
    """Defaults that follow from other arguments, so that the map's provenance has them."""
    from specattn_vllm.options import SpecAttnOptions

    if args.path is None:
        args.path = "free" if args.similarity == RETAINED else "monotone"
    if args.budget is None:
        args.budget = SpecAttnOptions.parse({"method": args.method}).ratio
    if args.queries is None and args.similarity != RETAINED:
        args.queries = QUERIES


def check(args: argparse.Namespace) -> None:
    """UserError for arguments that make no sense, by themselves or together."""
    least = {"window": 64, "windows": 1, "queries": 1, "rounds": 1, "draft_tokens": 1, "dense_layers": 0, "seed": 0}
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {value}")
    if args.ranks and not maps_heads(args):
        raise UserError("--ranks is for --method sts")
    if args.ranks is not None and args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: at least 1")
    if args.queries is not None and args.similarity == RETAINED:
        raise UserError("--queries is for other similarities than retained, which takes the rows of --rounds")
    if args.queries is not None and args.queries > args.window - args.window // 16:
        raise UserError(f"--queries {args.queries}: a window of {args.window} has {args.window - args.window // 16}")
    if args.rounds * (args.draft_tokens + 1) > args.window // 2:
        raise UserError(
            f"--rounds {args.rounds} of {args.draft_tokens + 1} tokens take more than half of a window of "
            f"{args.window}: fewer, or a longer --window"
        )
    if not 0 < args.budget <= 1:
        raise UserError(f"--budget {args.budget}: more than 0, at most 1")
    if args.retain is not None and not 0 < args.retain < 1:
        raise UserError(f"--retain {args.retain}: more than 0, less than 1")
    if args.retain is not None and args.shares == "none":
        raise UserError("--retain is for --shares kl and mass: nothing else divides a budget")
    if args.dense_above is not None and args.shares != "kl":
        raise UserError("--dense-above is for --shares kl: nothing else measures what a layer costs the output")
    if args.text is None and (args.target, args.draft) != (DEMO, DEMO):
        raise UserError("--text: give files of text like what will be served; only the demo pair brings its own")
    # Where both are there, the map is an earlier run's, and one that was to overwrite it was cut off: it goes on.
    if args.out.exists() and not args.overwrite and not state_file(args.out).exists():
        raise UserError(f"--out {args.out} exists: give another, or --overwrite")

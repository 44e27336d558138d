"""The arguments of `specattn eval methods` and `specattn eval table`. Standard library only."""

from __future__ import annotations

import argparse
from pathlib import Path

from specattn_vllm.installed import UserError
from specattn_vllm.tools.arguments import add_commit, add_engine_argument, add_gpus, add_pair
from specattn_vllm.tools.outputs import output_file

LEAST = {"documents": 1, "context": 1, "positions": 1, "draft_tokens": 1, "free_tokens": 2, "batch": 1}


def methods_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is compared")
    add_pair(what)
    what.add_argument(
        "--settings", type=Path, metavar="FILE.json", help='[{"name": ..., "options": {...}}, ...] in the place of ours'
    )
    what.add_argument(
        "--layer-map", type=Path, metavar="FILE.json",
        help="the pair's, for all settings whose selections come from a draft model and that name none themselves",
    )  # fmt: skip
    what.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="this setting, beside dense; may be repeated"
    )
    text = parser.add_argument_group("the text")
    source = text.add_mutually_exclusive_group()
    source.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="documents; short ones are strung together"
    )
    source.add_argument(
        "--held-out",
        action="store_true",
        help="Python's standard library, which the demo pair was not trained on (the default)",
    )
    text.add_argument("--documents", type=int, default=8, metavar="N", help="how many [%(default)s]")
    text.add_argument(
        "--context", type=int, default=4096, metavar="N", help="tokens before the first scored one [%(default)s]"
    )
    text.add_argument("--positions", type=int, default=512, metavar="N", help="scored in each document [%(default)s]")
    how = parser.add_argument_group("the engines")
    how.add_argument("--draft-tokens", type=int, default=4, metavar="K", help="drafted a round [%(default)s]")
    how.add_argument("--batch", type=int, default=8, metavar="N", help="documents at a time [%(default)s]")
    how.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    how.add_argument("--dtype", help="[float32 on a CPU, bfloat16 on a GPU]")
    add_engine_argument(how, "for every setting")
    how.add_argument(
        "--free-tokens", type=int, default=128, metavar="N",
        help="generated freely after each prompt, for the acceptance length [%(default)s]",
    )  # fmt: skip
    how.add_argument(
        "--record-kept", action="store_true",
        help="record what is kept of the first document, for the heat maps of `specattn report`",
    )  # fmt: skip
    run = parser.add_argument_group("running")
    run.add_argument(
        "--out", type=output_file, default=Path("specattn-eval.json"), metavar="FILE.json",
        help="written after each setting; what it holds already is not run again [%(default)s]",
    )  # fmt: skip
    run.add_argument("--overwrite", action="store_true", help="throw away what --out holds")
    run.add_argument("--list", action="store_true", help="show the settings and stop")
    add_gpus(run, "settings")
    add_commit(run)
    run.add_argument(
        "--keep-reference", action="store_true",
        help="keep the dense run's distributions, in a folder beside --out, for settings that are added later",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")


def table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="also draw it")
    parser.add_argument("--against", metavar="NAME", help="also the differences from this setting, paired by document")

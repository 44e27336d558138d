"""Arguments that several commands have, and their parsers, whose errors argparse shows. Standard library only."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specattn_vllm.tools.models import DEMO
from specattn_vllm.tools.outputs import output_file


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: a whole number, at least {least}")
        return value

    return convert


def positive(text: str) -> float:
    try:
        if 0 < (found := float(text)) < math.inf:
            return found
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}': a number above 0")


def share(text: str) -> float:
    """Of the context."""
    try:
        if 0 < (found := float(text)) <= 1:
            return found
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is no share of the context, a number above 0 and up to 1 such as 0.1")


def parse_option(text: str) -> tuple[str, Any]:
    """'sparse_draft=true' -> ('sparse_draft', True). The value is JSON; what is not JSON is taken as text."""
    key, sign, value = text.partition("=")
    if not (sign and key.strip()):
        raise argparse.ArgumentTypeError(f"'{text}' is not an option: write KEY=VALUE, e.g. sparse_draft=true")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value


def add_pair(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--target", default=DEMO, metavar="MODEL", help="a folder or a name on the hub [%(default)s]")
    group.add_argument("--draft", default=DEMO, metavar="MODEL", help="likewise [%(default)s]")


def add_engine_argument(group: argparse._ArgumentGroup, of: str) -> None:
    group.add_argument(
        "--engine-argument",
        type=parse_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"an argument of vllm.LLM {of}, e.g. enforce_eager=true; may be repeated",
    )


def add_gpus(group: argparse._ArgumentGroup, what: str) -> None:
    group.add_argument(
        "--gpus",
        type=lambda text: text.split(","),
        default=[],
        metavar="GPU,...",
        help=f"as many {what} at a time, each on one of these GPUs (as in CUDA_VISIBLE_DEVICES); default: one at a "
        "time, on the first",
    )


def add_running(group: argparse._ArgumentGroup, what: str, out: Path) -> None:
    """Where a report of `what`, which run one after the other, goes, and what becomes of an earlier one."""
    group.add_argument(
        "--out",
        type=output_file,
        default=out,
        metavar="FILE.json",
        help=f"written after every one of the {what}; logs go into a folder beside it [%(default)s]",
    )
    group.add_argument("--list", action="store_true", help="show what would run, with every argument, and stop")
    group.add_argument(
        "--resume", action="store_true", help=f"go on with --out: {what} measured there do not run again"
    )
    group.add_argument("--overwrite", action="store_true", help="throw away what --out holds")


def add_commit(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--commit", metavar="NAME", help="recorded, where the checkout does not know its own")

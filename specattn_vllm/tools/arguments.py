"""Arguments that several commands have, and their parsers, whose errors argparse shows. Standard library only."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from specattn_vllm.tools.models import DEMO
from specattn_vllm.tools.outputs import output_file

T = TypeVar("T")


def number(kind: Callable[[str], T], fits: Callable[[T], bool], what: str) -> Callable[[str], T]:
    """A parser of the numbers of a `kind` that fit; `what` says which these are."""

    def convert(text: str) -> T:
        try:
            if fits(found := kind(text)):
                return found
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text}: {what}")

    return convert


def at_least(least: int) -> Callable[[str], int]:
    return number(int, lambda found: found >= least, f"a whole number, at least {least}")


positive = number(float, lambda found: 0 < found < math.inf, "a number above 0")
share = number(float, lambda found: 0 < found <= 1, "a share of the context is above 0 and up to 1, such as 0.1")


def parse_list(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A parser of different values between commas."""

    def convert(text: str) -> list[T]:
        values = [parse(part.strip()) for part in text.split(",")]
        if len(set(values)) != len(values):
            raise argparse.ArgumentTypeError(f"'{text}' names one twice")
        return values

    return convert


def parse_option(text: str) -> tuple[str, Any]:
    """'sparse_draft=true' -> ('sparse_draft', True). The value is JSON; what is not JSON is taken as text."""
    key, sign, value = text.partition("=")
    if not (sign and key.strip()):
        raise argparse.ArgumentTypeError(f"'{text}' is not an option: write KEY=VALUE, e.g. sparse_draft=true")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value


def add_numbers(group: argparse._ArgumentGroup, *arguments: tuple[str, int | None, int, str]) -> None:
    """Whole numbers: name, default, the least, and help."""
    for name, default, least, told in arguments:
        shown = told if default is None else f"{told} [%(default)s]"
        group.add_argument(f"--{name}", type=at_least(least), default=default, metavar="N", help=shown)


def add_pair(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--target", default=DEMO, metavar="MODEL", help="a folder or a name on the hub [%(default)s]")
    group.add_argument("--draft", default=DEMO, metavar="MODEL", help="likewise [%(default)s]")


def add_engine(group: argparse._ArgumentGroup, of: str) -> None:
    """What engines run on, and arguments for all of them."""
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="[%(default)s]")
    told = f"an argument of vllm.LLM {of}, e.g. enforce_eager=true; may be repeated"
    group.add_argument(
        "--engine-argument", type=parse_option, action="append", default=[], metavar="KEY=VALUE", help=told
    )


def add_running(
    group: argparse._ArgumentGroup, what: str, out: Path, *, resume: bool = True, gpus: bool = True
) -> None:
    """Where a report of `what`, which run one after the other or one per GPU, goes, and what becomes of an earlier
    one: without `resume`, what it holds is never run again."""
    told = f"written after every one of the {what}; logs go into a folder beside it"
    told += " [%(default)s]" if resume else "; what it holds already is not run again [%(default)s]"
    group.add_argument("--out", type=output_file, default=out, metavar="FILE.json", help=told)
    group.add_argument("--list", action="store_true", help="show what would run, with every argument, and stop")
    if resume:
        told = f"go on with --out: {what} measured there do not run again"
        group.add_argument("--resume", action="store_true", help=told)
    group.add_argument("--overwrite", action="store_true", help="throw away what --out holds")
    if gpus:
        told = f"as many {what} at a time, each on one of these GPUs (as in CUDA_VISIBLE_DEVICES); default: one at a "
        told += "time, on the first"
        group.add_argument("--gpus", type=lambda text: text.split(","), default=[], metavar="GPU,...", help=told)
    add_commit(group)


def add_commit(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    group.add_argument("--commit", metavar="NAME", help="recorded, where the checkout does not know its own")

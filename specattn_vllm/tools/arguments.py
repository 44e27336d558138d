"""Arguments that several commands have. Standard library only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from specattn_vllm.tools.models import DEMO


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse's `type`: its error line shows our message only from its own kind of exception."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def parse_option(text: str) -> tuple[str, Any]:
    """'sparse_draft=true' -> ('sparse_draft', True). The value is JSON; what is not JSON is taken as text."""
    key, sign, value = text.partition("=")
    if not (sign and key.strip()):
        raise ValueError(f"'{text}' is not an option: write KEY=VALUE, e.g. sparse_draft=true")
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
        type=checked(parse_option),
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


def add_commit(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--commit", metavar="NAME", help="recorded, where the checkout does not know its own")

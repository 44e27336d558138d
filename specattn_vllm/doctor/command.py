"""The command line of `specattn doctor`."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict

from specattn_vllm.doctor.findings import Finding, examine
from specattn_vllm.installed import UserError
from specattn_vllm.tools.interrupts import ended_as_interrupted

WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "specattn doctor [--json] [--no-generation] [MODEL [arguments of vllm serve]]"
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--no-generation", action="store_true", help="leave out the engine that generates a few tokens")
    parser.add_argument(
        "serve",
        nargs=argparse.REMAINDER,
        metavar="MODEL ...",
        help="a model, and then arguments of `vllm serve`: is it served, and in how much memory",
    )


def run(args: argparse.Namespace) -> int:
    """0 without a problem, else 1."""
    # What follows MODEL is vLLM's, but for our own two flags, which it does not have.
    serve = [word for word in args.serve if word not in ("--", "--json", "--no-generation")]
    as_json, generate = args.json or "--json" in args.serve, not (args.no_generation or "--no-generation" in args.serve)
    if serve and serve[0].startswith("-"):
        raise UserError(f"doctor: {serve[0]} before the model: name the model first")
    found = []
    with ended_as_interrupted():  # so that SIGTERM ends the process of a probe too
        for finding in examine(serve, generate=generate):
            found.append(finding)
            if not as_json:
                print(as_text(finding), flush=True)
    healthy = not any(finding.status == "problem" for finding in found)
    if as_json:
        print(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in found]}, indent=2))
    return 0 if healthy else 1


def as_text(finding: Finding) -> str:
    mark = "PROBLEM" if finding.status == "problem" else finding.status
    lines = [f"{mark:8} {finding.check}: {finding.says}"]
    if finding.remedy:
        lines.append(f"{'':8} do: {finding.remedy}")
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False)
        for line in lines
    )

"""The command line of `specattn calibrate`. Loads torch and transformers where they are used."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from specattn_vllm.calibrate.arguments import add_arguments, check, fill_in
from specattn_vllm.installed import require
from specattn_vllm.tools.interrupts import ended_as_interrupted, resumed, status_of

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    fill_in(args)
    check(args)
    require(("torch", "transformers", "rich"))
    if args.picture:
        require(("matplotlib",))
    from specattn_vllm.calibrate.runner import calibrate

    try:
        with ended_as_interrupted():
            found = calibrate(args)
    except KeyboardInterrupt as interrupt:
        from specattn_vllm.calibrate.state import state_file

        print(f"\ninterrupted; this goes on from {state_file(args.out)}: {resumed()}")
        return status_of(interrupt)
    if args.picture:
        from specattn_vllm.calibrate import picture

        picture.save(found, args.picture)
    print(summary(args.out, found))
    return 0


def summary(out: Path, found: dict[str, Any]) -> str:
    def line(name: str, values: list) -> str:
        return f"  {name}: " + " ".join("-" if value is None else f"{value:g}" for value in values)

    lines = [f"{out}: '-' reads everything", line("draft layer per target layer", found["layers"])]
    if found["heads"] is not None:
        pairs = ("-" if row is None else ",".join(map(str, row)) for row in found["heads"])
        lines.append("  draft KV head per target KV head: " + " ".join(pairs))
    if found.get("induction") is not None:
        lines.append(line("layers that copy", [j for j, copies in enumerate(found["induction"]) if copies]))
    if found.get("shares") is not None:
        lines.append(line("share of the budget, 1 on average", found["shares"]))
        told = found["provenance"]["curves"]
        lines.append(f"  ratio {told['budget']:g} retains {told['retained']:.1%} of these layers' attention")
    return "\n".join(lines)

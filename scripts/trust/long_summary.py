#!/usr/bin/env python3
"""What happened in a long run of the tests, from pytest's JUnit files.

`scripts/test --long` calls it. The file has, for each setting of the random schedules, its seeds, its steps and what
they met; steps by method; and for each other test whether it passed, and how many faults it injected. A wrong token, a
block, table or code that is not what it should be, or a request that another's fault harms ends a test: it is a failure
here, with what was found.
"""

import argparse
import ast
import json
import subprocess
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]


def outcome(case: ElementTree.Element) -> str:
    for bad in ("failure", "error", "skipped"):
        if (found := case.find(bad)) is not None:
            return f"{bad}: {found.get('message', '')[:2000]}"
    return "passed"


def together(one: dict, other: dict) -> dict:
    """A setting that ran in several files. What failed in one has failed."""
    worst = next((x["outcome"] for x in (one, other) if x["outcome"] != "passed"), "passed")
    lists = {name: one[name] + other[name] for name in one if name == "seeds" and name in other}
    numbers = {
        name: one.get(name, 0) + other.get(name, 0) for name in (one | other) if name not in ("outcome", "seeds")
    }
    return {"outcome": worst} | numbers | lists


def properties(case: ElementTree.Element) -> dict:
    """What our tests note of themselves."""
    noted = {p.get("name"): p.get("value", "") for p in case.iter("property")}
    return {name: ast.literal_eval(noted[name]) for name in ("happened", "seeds", "injected") if name in noted}


def summary(files: list[Path]) -> dict:
    settings, others = {}, {}
    for case in (case for file in files for case in ElementTree.parse(file).iter("testcase")):
        told = properties(case)
        found = {"outcome": outcome(case), "seconds": round(float(case.get("time", 0)))}
        name = case.get("name", "")
        if "test_schedules" in case.get("classname", ""):
            found |= told.get("happened", {}) | ({"seeds": [told["seeds"]]} if "seeds" in told else {})
            setting = name.partition("[")[2].rstrip("]")
            settings[setting] = together(settings[setting], found) if setting in settings else found
        else:
            found |= {"injected": told["injected"]} if "injected" in told else {}
            others[f"{case.get('classname', '').rpartition('.')[2]}::{name}"] = found
    methods: Counter[str] = Counter()
    for setting, found in settings.items():
        methods[setting.replace(",", "").split()[0]] += found.get("steps", 0)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "what": "random schedules of requests, checked after each step, and faults (tests/engine/test_schedules.py)",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "steps": sum(methods.values()),
        "steps_by_method": dict(methods),
        "faults_injected": sum(found.get("injected", 0) for found in others.values()),
        "failures": sum(found["outcome"] != "passed" for found in (*settings.values(), *others.values())),
        "schedules": settings,
        "faults": others,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+", metavar="LONG.xml")
    parser.add_argument("target", type=Path, metavar="LONG.json")
    args = parser.parse_args()
    found = summary(args.sources)
    args.target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{args.target}: {found['steps']} steps, {found['failures']} failures")

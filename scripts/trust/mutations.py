#!/usr/bin/env python3
"""Checks that the tests catch errors: each mutation of `mutations.toml` is made in a copy of the repository, and the
tests that it names have to fail there.

    .venv/bin/python -P scripts/trust/mutations.py --out docs/results/mutations.json
    .venv/bin/python -P scripts/trust/mutations.py --out FILE.json --only "a draft's share of NaN is chosen"

First the same tests run in the copy as it is, and have to pass: else a failure would say nothing. With --only, what the
file says of other mutations stays in it, if they are still the same. Exit status 1: a mutation survived.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("mutations.toml")
PARTS = {"kernels": "specattn_vllm/kernels", "configs": "specattn_vllm/configs"}
"""Folders that stand elsewhere in the repository than in the package, where the copy has links to them."""
SECONDS = 1200
"""For the tests of one mutation."""


class Mutation(NamedTuple):
    """An error of one place: the text `old` of `file`, which stands there once, becomes `new`."""

    name: str
    part: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def of(self, text: str) -> str:
        """The file's text with the error in it."""
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: its text stands {times} times in {self.file}: mend {TABLE.name}")
        return text.replace(self.old, self.new)


class Outcome(NamedTuple):
    status: int
    """pytest's: 0 if all passed, 1 if a test failed; others mean that they did not run."""
    failed: list[str]
    seconds: float
    tail: str


def read(table: Path = TABLE) -> list[Mutation]:
    """The entries stand under the name of their part."""
    parts = tomllib.loads(table.read_text())
    return [
        Mutation(**entry | {"part": part, "tests": tuple(entry["tests"])})
        for part, entries in parts.items()
        for entry in entries
    ]


def copy(root: Path, folder: Path) -> None:
    """The files that git knows or would take, and a folder to import the package from."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    # Not the whole copy: there, `kernels/` would hide a PyPI package of that name.
    (folder / "on-path").mkdir()
    (folder / "on-path" / "specattn_vllm").symlink_to(folder / "specattn_vllm")
    for source, place in PARTS.items():
        (folder / place).symlink_to(folder / source)


def preload(folder: Path) -> None:
    """Import what takes long and is not ours. Each run is then a fork of this process, and begins at once."""
    sys.path[:0] = [str(folder / "on-path")]  # before an editable installation
    # Compiled files are told from old ones by the second of a change, and changes come faster here.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(folder / "on-path"), "PYTHONDONTWRITEBYTECODE": "1"}
    # Only whether a test fails is of interest, not the shortest way to make it fail.
    os.environ |= {"SPECATTN_FIRST_FAILURE": "1", "SPECATTN_SHRINK_SECONDS": "0", "SPECATTN_LONG": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has one thread
    if shutil.which("nvidia-smi") is None:
        # As tests/conftest.py does, before anything imports triton.
        from specattn_vllm import cpu_runner

        os.environ |= cpu_runner.environment()
        sys.path[:0] = [str(cpu_runner.OVERLAY)]
    for name in ("torch", "triton", "hypothesis", "vllm", "vllm.v1.worker.gpu.model_runner"):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "specattn_vllm"]:
        del sys.modules[name]  # ours is what changes


def run(folder: Path, tests: Sequence[str]) -> Outcome:
    """Run tests of a copy."""
    report, log = folder / "report.xml", folder / "log"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, report, log, tests))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    failed = []
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}")
    tail = log.read_text(errors="replace")[-3000:]
    return Outcome(process.exitcode, failed, round(time.monotonic() - start, 1), tail)


def _pytest(folder: Path, report: Path, log: Path, tests: Sequence[str]) -> None:
    import pytest

    with log.open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.chdir(folder)
    words = ["-q", "-p", "no:cacheprovider", "-n", "0", "--maxfail", "3", "--junitxml", str(report), *tests]
    status = int(pytest.main(words))
    sys.stdout.flush()
    os._exit(status)  # not what vLLM and torch would do at the end of this process


def attempt(folder: Path, mutation: Mutation) -> dict:
    """What the tests say of one mutation; the copy is then as before."""
    file = folder / mutation.file
    right = file.read_text()
    file.write_text(mutation.of(right))
    try:
        found = run(folder, mutation.tests)
    finally:
        file.write_text(right)
    outcome = {0: "survived", 1: "caught"}.get(found.status, f"the tests did not run: {found.tail}")
    told = mutation._asdict() | {"tests": list(mutation.tests)}
    return told | {"outcome": outcome, "caught_by": found.failed, "seconds": found.seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    args = parser.parse_args()
    table = read()
    names = [mutation.name for mutation in table]
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"no mutation has the name {', '.join(sorted(unknown))}")
    wanted = [mutation for mutation in table if mutation.name in (args.only or names)]
    for mutation in wanted:
        mutation.of((ROOT / mutation.file).read_text())  # before anything takes time
    found = kept(args.out, table) if args.only else {}
    with tempfile.TemporaryDirectory(prefix="specattn-mutations-") as name:
        folder = Path(name)
        copy(ROOT, folder)
        preload(folder)
        before = run(folder, sorted({test for mutation in wanted for test in mutation.tests}))
        if before.status:
            print(before.tail, file=sys.stderr)
            print("the tests do not pass without a mutation: nothing can be said", file=sys.stderr)
            return 2
        print(f"the tests pass as they are, in {before.seconds} s", flush=True)
        for mutation in wanted:
            found[mutation.name] = attempt(folder, mutation)
            print(f"{found[mutation.name]['outcome'][:200]}: {mutation.part}: {mutation.name}", flush=True)
            write(args.out, [found[name] for name in names if name in found], bool(args.only))
    return int(any(entry["outcome"] != "caught" for entry in found.values()))


def kept(out: Path, table: Sequence[Mutation]) -> dict[str, dict]:
    """What a file says of mutations that are still what they were."""
    entries = json.loads(out.read_text())["mutations"] if out.exists() else []
    same = {mutation.name: mutation._asdict() | {"tests": list(mutation.tests)} for mutation in table}
    return {e["name"]: e for e in entries if {key: e.get(key) for key in Mutation._fields} == same.get(e["name"])}


def write(out: Path, entries: list[dict], in_parts: bool) -> None:
    """in_parts: whether some were tried at other times than others, with --only."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    report = {
        "what": "errors made in the product on purpose, and the tests that caught them (scripts/trust/mutations.py)",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "command": f"python -P scripts/trust/mutations.py --out {out}",
        "in_parts": in_parts,
        "caught": sum(entry["outcome"] == "caught" for entry in entries),
        "of": len(entries),
        "mutations": entries,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

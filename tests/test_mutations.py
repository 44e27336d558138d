"""The table of errors that tests must catch fits the code, and the script that makes them says what happened."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = importlib.util.spec_from_file_location("mutations", ROOT / "scripts" / "trust" / "mutations.py")
mutations = importlib.util.module_from_spec(SCRIPT)
SCRIPT.loader.exec_module(mutations)
TABLE = mutations.read()


@pytest.mark.parametrize("mutation", TABLE, ids=lambda mutation: mutation.name)
def test_each_entry_is_an_error_of_the_code_as_it_is(mutation):
    right = (ROOT / mutation.file).read_text()
    wrong = mutation.of(right)
    assert wrong != right
    compile(wrong, mutation.file, "exec")  # an error that no test needs to find would tell nothing
    for test in mutation.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).exists(), path
        if name:
            function = name.partition("[")[0]
            assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.M), test


def test_no_two_entries_have_one_name_and_each_part_has_some():
    names = Counter(mutation.name for mutation in TABLE)
    assert [name for name, number in names.items() if number > 1] == []
    assert {mutation.part for mutation in TABLE} == {
        "random schedules", "kernels", "faults", "options and maps", "audit", "metrics", "security", "guarantee",
        "fp8 caches", "hybrid models", "load", "drift", "soft caps", "KV connectors",
    }  # fmt: skip


def test_the_result_that_is_kept_is_of_this_table():
    out = ROOT / "docs" / "results" / "mutations.json"
    kept = json.loads(out.read_text())
    assert [entry["name"] for entry in kept["mutations"]] == [mutation.name for mutation in TABLE]
    # Each is still the same error, so that none is dropped when others are tried with --only.
    assert [*mutations.kept(out, TABLE)] == [mutation.name for mutation in TABLE]
    assert {entry["outcome"] for entry in kept["mutations"]} == {"caught"}


def test_a_text_that_is_gone_or_stands_twice_is_an_error():
    mutation = mutations.Mutation("n", "p", "f.py", "old", "new", ())
    assert mutation.of("an old one") == "an new one"
    for text in ("nothing", "old and old"):
        with pytest.raises(ValueError, match=r"^n: its text stands [02] times in f\.py"):
            mutation.of(text)


@pytest.fixture
def folder(tmp_path):
    """A copy with one module and one test, which passes."""
    (tmp_path / "doubling.py").write_text("def double(x):\n    return 2 * x\n")
    test = "from doubling import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
    (tmp_path / "test_it.py").write_text(f"import sys\n\nsys.path.insert(0, {str(tmp_path)!r})\n{test}")
    return tmp_path


def attempt(folder: Path, new: str, tests: str) -> dict:
    """What becomes of an error, in a process of its own: tests run in a fork of it, and here would be one of pytest."""
    code = (
        "import sys, json, pathlib; sys.path.insert(0, sys.argv[1]); import mutations as m\n"
        "error = m.Mutation('n', 'p', 'doubling.py', '2 * x', sys.argv[3], (sys.argv[4],))\n"
        "print(json.dumps(m.attempt(pathlib.Path(sys.argv[2]), error)))"
    )
    command = [sys.executable, "-P", "-B", "-c", code, ROOT / "scripts" / "trust", folder, new, tests]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("new", "outcome", "caught_by"),
    [
        ("3 * x", "caught", ["test_it.py::test_double"]),
        ("x * 2", "survived", []),
    ],
)
def test_an_error_is_caught_or_survives_and_is_undone(folder, new, outcome, caught_by):
    right = (folder / "doubling.py").read_text()
    found = attempt(folder, new, "test_it.py")
    assert (found["outcome"], found["caught_by"]) == (outcome, caught_by)
    assert (folder / "doubling.py").read_text() == right


def test_tests_that_do_not_run_catch_nothing(folder):
    assert attempt(folder, "3 * x", "test_other.py")["outcome"].startswith("the tests did not run")

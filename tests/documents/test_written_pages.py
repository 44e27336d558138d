"""Pages with sections that scripts write: they are what would be written, and another page is an error."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "scripts" / "pages"
SPEC = importlib.util.spec_from_file_location("written_page", PAGES / "written_page.py")
written_page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(written_page)


@pytest.mark.parametrize("script", ["options_page.py", "refusals_page.py"])
def test_the_page_is_what_the_code_says(script):
    subprocess.run([sys.executable, "-P", PAGES / script, "--check"], check=True)


PAGE = """Kept.

<!-- made by scripts/pages/it.py: one -->

{}
<!-- end -->
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE.format("old\n"))
    return path


def run(page: Path, monkeypatch, *arguments: str, **sections: str) -> int:
    monkeypatch.setattr(sys, "argv", ["it.py", *arguments])
    return written_page.main("it", "Writes it.", page, sections)


def test_a_section_is_written(page, monkeypatch):
    assert run(page, monkeypatch, "--check", one="new\n") == 1
    assert page.read_text() == PAGE.format("old\n")
    assert run(page, monkeypatch, one="new\n") == 0
    assert page.read_text() == PAGE.format("new\n")
    assert run(page, monkeypatch, "--check", one="new\n") == 0


@pytest.mark.parametrize("sections", [{}, {"one": "old\n", "two": "x\n"}, {"other": "old\n"}])
@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_a_page_with_other_sections_is_an_error(page, sections, arguments, monkeypatch, capsys):
    assert run(page, monkeypatch, *arguments, **sections) == 1
    assert "it: error: the sections of page.md are one, not " in capsys.readouterr().err
    assert page.read_text() == PAGE.format("old\n")


@pytest.fixture
def refusals(monkeypatch):
    monkeypatch.syspath_prepend(str(PAGES))
    import refusals_page

    return refusals_page


def test_a_check_that_stands_in_no_section_is_an_error(refusals, monkeypatch):
    monkeypatch.setitem(refusals.FUNCTIONS, "drafters", ("_speculation",))
    with pytest.raises(ValueError, match=r"^checks\.py: _positions yields reasons: add it to a section$"):
        refusals.sections()


def test_reasons_and_errors_are_read_from_the_source(refusals):
    tree = refusals.ast.parse(
        "def f():\n    yield f'{a.b_c} = {size!r}: ' 'use ' f'{1 + 1}'\n    raise E(f'{x} is no {KEY}')\n"
    )
    assert [*refusals.yielded(tree, "f")] == ["<b c> = <size>: use ..."]
    assert [*refusals.raised(tree)] == ["<x> is no specattn"]
    with pytest.raises(ValueError, match=r"^f, line 2: a reason is no text that can be read here$"):
        [*refusals.yielded(refusals.ast.parse("def f():\n    yield reason\n"), "f")]


def test_a_function_that_raises_no_more_is_an_error(refusals):
    with pytest.raises(ValueError, match=r"^checks\.py: _positions raises no error with a text"):
        refusals.of_raises(("checks.py _positions",))

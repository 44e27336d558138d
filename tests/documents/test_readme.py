"""What the README says: its links and its tree lead somewhere, options are as they are documented, its code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "docker/README.md")
    ),
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link, part in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", document.read_text()):
        if link.startswith("https://"):
            continue
        page = document.parent / link if link else document
        assert page.exists(), link
        assert not part or part in headings(page), f"{link}#{part}"


def headings(page: Path) -> set[str]:
    """As GitHub names them."""
    found = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_tree_names_what_is_there():
    page = (ROOT / "docs/architecture.md").read_text()
    tree = page.split("```\nspecattn_vllm/\n")[1].split("```")[0]
    folder = ROOT / "specattn_vllm"
    listed = set()
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            listed.add(name.rstrip("/"))
            assert (folder / name).exists(), name
        else:
            assert (ROOT / name).is_dir(), name
    there = {p.name for p in folder.iterdir() if not p.name.startswith("__")}
    unlisted = {"fingerprint.py", "py.typed", "versions.py"}
    assert there - listed == unlisted, "named in a line of another, or too small to name"


def test_few_options_are_for_users():
    users = (ROOT / "docs/options.md").read_text().split("## For users")[1].split("## For researchers")[0]
    assert 5 < len(re.findall(r"^\| `\w+` \|", users, re.M)) <= 15


def test_it_is_one_screen():
    assert len(README.splitlines()) <= 110 and len(README.split()) <= 800


def test_each_page_is_named():
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    assert pages - set(re.findall(r"\]\(([^)#]+)", README)) == set()


@pytest.mark.engine
def test_the_offline_example_runs(tmp_path):
    """As it stands in the README, with the demo pair for TARGET and DRAFT, in a process of its own."""
    from specattn_vllm import cli

    code = README.split("```python\n")[1].split("```")[0]
    target, draft = (str(cli.demo_folder(role)) for role in cli.DEMO_ROLES)
    code = code.replace('"TARGET"', repr(target)).replace('"DRAFT"', repr(draft))
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    script = tmp_path / "example.py"
    # vLLM starts its workers by spawning, which runs the module again.
    script.write_text(f"def main():\n{indented}\n\nif __name__ == '__main__':\n    main()\n")
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip()

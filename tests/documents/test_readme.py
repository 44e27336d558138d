"""What the README says: its links and its tree lead somewhere, options are as they are documented, its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from specattn_vllm.methods import METHODS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "kernels" / "README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    for link in links:
        assert link.startswith("https://") or (document.parent / link).exists(), link


def test_the_tree_names_what_is_there():
    tree = README.split("```\nspecattn_vllm/\n")[1].split("```")[0]
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
    unlisted = {"completion.py", "fingerprint.py", "py.typed", "versions.py"}
    assert there - listed == unlisted, "named in a line of another, or too small to name"


def methods_of(text: str) -> set[str]:
    """'all', 'all but `x`' or '`x`, `y`'."""
    named = set(re.findall(r"`(\w+)`", text))
    return METHODS.keys() - named if text.startswith(("all", "All")) else named


def as_documented(default: object) -> str:
    if default is None or default == ():
        return "none"
    return str(default).lower().removesuffix(".0") if default == 60 or isinstance(default, bool) else str(default)


def default_of(text: str, method: str) -> str:
    """'0.125 `sketch`, else 0.1', or one for all."""
    own = {name: value for value, name in re.findall(r"(\S+) `(\w+)`", text)}
    return own.get(method, text.split()[-1].strip("`"))


OPTIONS = (ROOT / "docs/options.md").read_text()
USERS, RESEARCHERS = OPTIONS.split("## For users")[1].split("## How they go together")[0].split("## For researchers")


@pytest.mark.parametrize("method", METHODS)
def test_the_options_are_documented_with_their_defaults(method):
    documented = {}
    for key, of, default in re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|", USERS, re.M):
        if method in methods_of(of):
            documented[key] = "users", default_of(default, method)
    for section in RESEARCHERS.split("### ")[1:]:
        if method in methods_of(section.splitlines()[0]):
            rows = re.findall(r"^\| `(\w+)` \| (\S+)", section, re.M)
            documented |= {key: ("researchers", default.strip("`")) for key, default in rows}
    fields = METHODS[method].options.model_fields
    expected = {
        key: ((field.json_schema_extra or {"for": "users"})["for"], as_documented(field.default))
        for key, field in fields.items()
    }
    assert documented == expected | {"method": ("users", "sketch")}


def test_few_options_are_for_users():
    assert len(re.findall(r"^\| `\w+` \|", USERS, re.M)) <= 15


def test_the_options_of_the_readme_are_for_users():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", README.split("## Options")[1].split("## How")[0], re.M)
    documented = {key: default for key, _, default in re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|", USERS, re.M)}
    assert rows and dict(rows).items() <= documented.items()


@pytest.mark.engine
def test_the_offline_example_runs(tmp_path):
    """As it stands in the README, with the demo pair for TARGET and DRAFT, in a process of its own."""
    import os
    import subprocess
    import sys

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

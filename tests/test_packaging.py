"""What an installation contains, and what it leaves alone. Builds the wheel once, without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "specattn_vllm"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DIST_INFO = f"specattn_vllm-{PYPROJECT['project']['version']}.dist-info"


def normal_environment(**more: str) -> dict[str, str]:
    """Without what scripts/test sets for a machine without a GPU."""
    ours = ("PYTHONPATH", "TRITON_INTERPRET")
    return {name: value for name, value in os.environ.items() if name not in ours} | more


def run_python(program: str, env: dict[str, str]) -> str:
    result = subprocess.run([sys.executable, "-P", "-c", program], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # A copy, because setuptools builds in the source folder and would take up files of an earlier build there.
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "specattn_vllm",
        "kernels",
        "configs",
        "tests",
        "scripts",
    ):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name)
        elif path.exists():
            shutil.copy(path, source / name)
    # What must stay out: a compiled file of the overlay, as Python leaves it there on a machine that used it.
    compiled = source / "specattn_vllm/cpu_runner/overlay/specattn_triton_cpu/__pycache__/driver.cpython-311.pyc"
    compiled.parent.mkdir(exist_ok=True)
    compiled.write_bytes(b"")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--verbose"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(output), str(source)], env=normal_environment(), capture_output=True, text=True
    )
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    assert "absent from the `packages` configuration" not in log
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked where PYTHONPATH finds it before the editable install."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], env=normal_environment(), check=True)
    return target


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {f"specattn_vllm/{name}" for name in files_below(PACKAGE)}
    expected |= {f"specattn_vllm/kernels/{name}" for name in files_below(ROOT / "kernels")}
    expected |= {f"specattn_vllm/configs/{name}" for name in files_below(ROOT / "configs")}
    # Notes for readers of the repository stay there, and so does the demo pair.
    expected = {name for name in expected if not name.endswith(".md") and not name.startswith("specattn_vllm/demo/")}
    expected |= {
        f"{DIST_INFO}/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(names) == sorted(expected)


def test_the_wheel_says_that_it_has_types(wheel):
    assert "specattn_vllm/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_the_wheel_is_small(wheel):
    """12 MB with the demo pair."""
    assert wheel.stat().st_size < 1_000_000


def test_an_installed_wheel_says_where_the_demo_pair_is(installed):
    program = "import sys; from specattn_vllm import cli; sys.exit(cli.main(['demo-path', 'target']))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=normal_environment(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("specattn: error: the demo target model is not in this installation")
    assert "`pip install -e .` in a clone" in done.stderr


def test_an_installed_wheel_lists_benchmarks_of_other_shapes(installed):
    program = "import sys; from specattn_vllm import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "bench", "engines", "--list", "--modes", "plain"],
        env=normal_environment(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plain\n")


@pytest.fixture
def built(made_venv, tmp_path):
    """built(folder, umask) -> the files that scripts/build makes, in an environment of its own."""

    def build(name: str, umask: str) -> dict[str, Path]:
        environment = normal_environment(SPECATTN_VENV=str(made_venv), SOURCE_DATE_EPOCH="1700000000")
        command = f"umask {umask}; exec {ROOT}/scripts/build {tmp_path / name}"
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        return {path.name: path for path in (tmp_path / name).iterdir()}

    return build


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="scripts/build asks git which files there are")
def test_builds_are_the_same_byte_for_byte_and_the_source_is_whole(built):
    first = built("first", "022")
    time.sleep(1.1)  # so that an archive that holds the time of its making differs
    second = built("second", "077")
    assert {name.rpartition(".")[2] for name in first} == {"gz", "whl"} and first.keys() == second.keys()
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes(), name

    (archive,) = (path for name, path in first.items() if name.endswith(".tar.gz"))
    top = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as source:
        names = {name.removeprefix(f"{top}/") for name in source.getnames()}
        executable = source.getmember(f"{top}/scripts/serve").mode
        readme = source.extractfile(f"{top}/README.md").read().decode()
        shown = source.extractfile(f"{top}/PKG-INFO").read().decode()
    there = subprocess.run(["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = {name for name in there.stdout.splitlines() if (ROOT / name).exists()} - names
    assert not missing, "name them in MANIFEST.in"
    assert executable == 0o755
    # A package index shows README alone.
    links = re.findall(r"\]\(([^)]*)\)", readme)
    home = "https://github.com/specattn-vllm/specattn-vllm"
    assert f"{home}/blob/main/docs/tuning.md" in links and f"{home}/raw/main/docs/images/speed.svg" in links
    assert all(link.startswith("https://") for link in links), links
    assert readme in shown


def test_entry_points(wheel):
    text = zipfile.ZipFile(wheel).read(f"{DIST_INFO}/entry_points.txt").decode()
    groups = {}
    for line in filter(None, text.splitlines()):
        if header := re.fullmatch(r"\[(.+)\]", line):
            entries = groups[header[1]] = []
        else:
            entries.append(line)
    assert groups == {
        "console_scripts": ["specattn = specattn_vllm.cli:main"],
        # Nothing under triton.backends: vLLM's CPU wheel takes the mere entry point for a working Triton.
        "vllm.general_plugins": ["specattn = specattn_vllm.plugin:register"],
    }


def test_the_metadata_forces_no_build_of_vllm(wheel):
    lines = zipfile.ZipFile(wheel).read(f"{DIST_INFO}/METADATA").decode().splitlines()
    unconditional = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert unconditional == ["Requires-Dist: pydantic>=2.12"]
    assert "License-Expression: Apache-2.0" in lines


def test_importing_the_package_loads_neither_torch_nor_vllm(installed):
    program = """
import json, sys
import specattn_vllm, specattn_vllm.cli, specattn_vllm.cpu_runner, specattn_vllm.configs
print(json.dumps([specattn_vllm.__file__, sorted({"torch", "triton", "vllm", "numpy"} & set(sys.modules))]))
"""
    file, heavy = json.loads(run_python(program, normal_environment(PYTHONPATH=str(installed))))
    assert Path(file).is_relative_to(installed)
    assert heavy == []


OVERLAY_PROBE = """
import importlib.util, json
from importlib import metadata
from specattn_vllm import cpu_runner
print(json.dumps({
    "overlay": str(cpu_runner.OVERLAY),
    "triton backend": [point.value for point in metadata.entry_points(group="triton.backends", name="cpu")],
    "distributions": [dist.version for dist in metadata.distributions(name="vllm")
                      if "cpu_runner" in str(dist.locate_file(""))],
    "module": importlib.util.find_spec("specattn_triton_cpu") is not None,
    "environment": cpu_runner.environment(),
}))
"""


def test_the_cpu_overlay_shows_only_in_its_own_environment(installed):
    normal = json.loads(run_python(OVERLAY_PROBE, normal_environment(PYTHONPATH=str(installed))))
    assert Path(normal["overlay"]).is_relative_to(installed)
    assert (normal["triton backend"], normal["distributions"], normal["module"]) == ([], [], False)

    opted_in = json.loads(run_python(OVERLAY_PROBE, normal_environment() | normal["environment"]))
    assert opted_in["triton backend"] == ["specattn_triton_cpu"]
    assert opted_in["distributions"] == ["0.32.0+cpu"]
    assert opted_in["module"]


def test_an_editable_install_hides_the_overlay_too():
    normal = json.loads(run_python(OVERLAY_PROBE, normal_environment()))
    assert (normal["triton backend"], normal["distributions"], normal["module"]) == ([], [], False)

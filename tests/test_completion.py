"""`specattn completion`: the script has every option of every subcommand, and shells take it."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from specattn_vllm import cli, completion


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options(below)


@pytest.mark.parametrize("shell", completion.WHERE)
def test_the_script_has_every_subcommand_and_option(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    wanted = {*options(cli.build_parser(*cli.COMMANDS))}
    assert {"--grid", "--no-generation", "--settings"} <= wanted
    assert all((option.removeprefix("--") if shell == "tcsh" else option) in script for option in wanted)
    assert all(name in script for name in cli.COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_is_of_that_shell(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(completion.script(shell))
    assert subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True).stderr == b""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["do"], {"doctor"}),
        (["doctor", "--j"], {"--json"}),
        (["bench", "--gr"], {"--grid"}),  # of the part that runs where none is named
        (["bench", "kernels", "--on"], {"--only"}),
        (["demo-path", ""], {"target", "draft"}),
        (["bench", "table", "report."], {"report.json"}),
        (["calibrate", "--target", "mod"], {"model"}),
    ],
    ids=lambda words: " ".join(sorted(words)),
)
def test_bash_completes(words, offered, tmp_path):
    (tmp_path / "script").write_text(completion.script("bash"))
    (tmp_path / "report.json").touch()
    (tmp_path / "model").mkdir()
    program = """
        source ./script
        COMP_WORDS=(specattn "$@") COMP_CWORD=$# COMPREPLY=()
        _shtab_specattn
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", program, "x", *words], cwd=tmp_path, capture_output=True, text=True)
    assert {*done.stdout.split()} == offered, done.stderr


def refused(prepare: str) -> str:
    program = f"import sys; {prepare}; from specattn_vllm import cli; sys.exit(cli.main(['completion', 'bash']))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_what_is_missing_is_named():
    told = refused("sys.modules['shtab'] = None")
    assert told == "specattn: error: shtab is not installed: pip install 'specattn-vllm[completion]'\n"
    told = refused("sys.modules['pydantic'] = None")
    assert told.startswith("specattn: error: completion lists the options of all subcommands") and "doctor" in told

"""One form of error: `NAME: error: what is wrong, and what to do`, of the command and of every script."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("models/real_model.py", ["--from", "absent", "--out", "{}/x"], "--from absent: no such file"),
        (
            "models/distil_draft.py",
            ["--target", "absent", "--out", "{}/x"],
            "--target absent holds no model: run scripts/",
        ),
        ("models/real_corpus.py", ["--model", "absent", "{}/x"], "absent holds no tokenizer: run scripts/real_model"),
    ],
)
def test_scripts(script, arguments, message, tmp_path):
    done = run(sys.executable, "-P", ROOT / "scripts" / script, *(word.format(tmp_path) for word in arguments))
    assert done.returncode in (1, 2)
    assert done.stderr.splitlines()[-1].startswith(f"{Path(script).name}: error: {message}")


def test_shell_scripts(made_venv):
    done = run("env", f"SPECATTN_VENV={made_venv}", ROOT / "scripts/serve", "--draft", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "serve: error: --draft goes with --real: the demo pair has its own\n"


def test_the_command():
    done = run(sys.executable, "-P", "-m", "specattn_vllm.cli", "doctor", "--", "--port", "1")
    assert (done.returncode, done.stderr) == (
        2,
        "specattn: error: doctor: --port before the model: name the model first\n",
    )


def test_no_script_ends_in_another_form():
    for path in (ROOT / "scripts").rglob("*.py"):
        for raised in re.findall(r"raise SystemExit\(.*|sys\.exit\(f?\".*", path.read_text()):
            assert path.name == "refusal.py" or ": error: " in raised or "stopped" in raised, (path, raised)
    for path in [*(ROOT / "scripts").iterdir(), *(ROOT / "scripts/lib").iterdir(), ROOT / ".ci/run"]:
        if path.is_file() and path.read_text().startswith("#!/usr/bin/env bash"):
            text = path.read_text()
            for line in re.findall(r".*>&2\n\s+exit [1-9].*", text):
                assert "error: " in line, (path, line)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "trust/drift.py",
            ["--target", "", "--text", __file__, "--out", "x"],
            "argument --target: '' holds no model: run",
        ),
        (
            "trust/audit_error.py",
            ["--target", "{}", "--text", __file__, "--out", "x"],
            "argument --target: '{}' holds no",
        ),
        ("trust/load.py", ["--concurrency", "0"], "argument --concurrency: 0 is not 1 or more"),
        (
            "trust/load.py",
            ["--url", "http://127.0.0.1:9", "--minutes", "0.1"],
            "no server answers at http://127.0.0.1:9, as",
        ),
        ("trust/load.py", ["--shape", "tiny", "--log", "{}/log", "--", "--no-such"], "the server ended: "),
    ],
)
def test_scripts_on_engines(script, arguments, message, tmp_path):
    done = run(sys.executable, "-P", ROOT / "scripts" / script, *(word.format(tmp_path) for word in arguments))
    assert done.returncode in (1, 2)
    assert done.stderr.splitlines()[-1].startswith(f"{Path(script).name}: error: {message.format(tmp_path)}"), (
        done.stderr
    )

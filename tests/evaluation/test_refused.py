"""What `specattn eval` cannot measure is refused with its reason before an engine starts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from specattn_vllm import cli, installed
from specattn_vllm.evaluation import runner
from specattn_vllm.installed import demo_folder


@pytest.fixture
def refusal(capsys, tmp_path, monkeypatch):
    """refusal(words...): what the command says, which must end with 2 and start nothing."""

    def no_engine(*args):
        raise AssertionError("an engine started")

    monkeypatch.setattr(runner, "measured", no_engine)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        assert cli.main(["eval", *words, "--device", "cpu"]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_folder_that_is_not_there(refusal, role):
    message = refusal("methods", f"--{role}", "./nowhere")
    assert message.startswith(f"specattn: error: --{role} ./nowhere: there is no such folder")


def test_a_folder_without_a_model(refusal, tmp_path):
    assert f"--target {tmp_path}: no config.json in this folder" in refusal("methods", "--target", str(tmp_path))


def test_a_folder_without_a_tokenizer(refusal, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((demo_folder("target") / "config.json").read_text())
    message = refusal("methods", "--target", str(folder))
    assert f"--target {folder}: no tokenizer in this folder" in message and "see that its files are whole" in message


def test_a_context_beyond_the_model_names_the_longest(refusal):
    there = json.loads((demo_folder("target") / "config.json").read_text())["max_position_embeddings"]
    message = refusal("methods", "--context", str(there + 1), "--positions", "10", "--free-tokens", "2")
    assert f"the demo target has {there:,}" in message
    most = int(message.split("--context ")[2].split()[0])
    assert "the demo target has" in refusal(
        "methods", "--context", str(most + 1), "--positions", "10", "--free-tokens", "2"
    )
    from specattn_vllm.evaluation.job import positions_needed

    assert positions_needed(most, 10, 4, 2) == there


def test_a_bare_install_is_told_what_brings_what_is_missing(monkeypatch, capsys):
    """As after `pip install specattn-vllm` alone."""
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    for words, extra in (
        (["eval", "table", "report.json"], "bench"),
        (["report", "report.json"], "bench"),
        (["eval", "methods"], "gpu"),
        (["bench", "engines", "--shape", "demo"], "gpu"),
        (["bench", "kernels"], "gpu"),
        (["calibrate", "--out", "map.json"], "gpu"),
    ):
        assert cli.main(words) == 2, words
        assert f"pip install 'specattn-vllm[{extra}]'" in capsys.readouterr().err, words


def test_a_report_is_read_without_torch_and_vllm():
    """The extra 'bench' is enough to read reports."""
    program = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'transformers', 'tqdm'): sys.modules[name] = None\n"
        "from specattn_vllm import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    report = "docs/results/h200-real-8k.json"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "eval", "table", report],
        capture_output=True,
        text=True,
        cwd=__file__.rpartition("/tests/")[0],
    )
    assert done.returncode == 0 and done.stdout.startswith("| method |"), done.stderr

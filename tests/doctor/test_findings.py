"""The doctor's findings: what is broken is named, with what to do, and nothing that depends on it is tried."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specattn_vllm import cli, installed
from specattn_vllm.doctor import command, findings, probes
from specattn_vllm.doctor.findings import Finding, examine

SIZES = {
    "says": "M can be served",
    "buffers": {"scores": 2 * 2**30, "pages": 2**29},
    "weights": 15 * 2**30,
    "largest": 2**31,
    "kv_per_token": 140_000,
    "kv_in_windows": 0,
    "kv_in_states": 0,
    "stateful_layers": 0,
    "sketch_share": 0.066,
    "max_num_seqs": 64,
    "max_model_len": 131_072,
    "room": 70 * 2**30,
}


@pytest.fixture
def answers(monkeypatch):
    """What is installed, what probes answer, and which of them were asked."""
    told = {
        "problems": [],
        "specattn-vllm": "0.1.0",
        "python": "3.11",
        "versions": {"vllm": "0.32.0", "torch": None},
        "gpus": [{"name": "H200", "memory": "141 GiB"}],
        "executor": "fa3",
    }
    given = {"told": told, "plugin": {"says": "loaded"}, "config": SIZES, "generate": {"says": "8 tokens"}, "asked": []}

    def ask(name, *arguments):
        given["asked"].append((name, *arguments))
        return given[name]

    monkeypatch.setattr(findings.info, "gather", lambda: given["told"])
    monkeypatch.setattr(findings, "ask", ask)
    return given


def found(*serve: str, generate: bool = True) -> dict[str, Finding]:
    made = {finding.check: finding for finding in examine(serve, generate=generate)}
    assert all(finding.remedy for finding in made.values() if finding.status == "problem")
    return made


def statuses(made: dict[str, Finding]) -> dict[str, str]:
    return {check: finding.status for check, finding in made.items()}


def test_layers_of_other_kinds_are_named(answers):
    answers["config"] = SIZES | {"stateful_layers": 36, "kv_in_states": 2**30}
    says = found("M")["memory"].says
    assert "18.1 GiB of KV cache" in says and " and 1.0 GiB for the states of 36 layers of linear attention" in says
    answers["config"] = SIZES | {"kv_in_windows": 2**30}
    assert " and 1.0 GiB in layers with a sliding window)" in found("M")["memory"].says


def test_a_healthy_installation(answers):
    made = found("M", "--max-num-seqs", "64")
    assert set(statuses(made).values()) == {"ok"}
    assert answers["asked"] == [
        ("plugin",),
        ("config", "M", "--max-num-seqs", "64"),
        ("generate", *answers["asked"][2][1:]),
    ]
    says = made["memory"].says
    for part in (
        "2.5 GiB of buffers for 64 requests of 131,072 tokens (scores 2.0 GiB, pages 512.0 MiB)",
        "15.0 GiB of weights",
        "17.1 GiB of KV cache for one longest request",
        "6.6% of it the sketch",
        "vLLM would use 70.0 GiB",
    ):
        assert part in says


def test_without_a_model_and_without_a_generation_nothing_is_asked_for_them(answers):
    made = statuses(found(generate=False))
    assert made["model"] == made["generation"] == "skipped"
    assert answers["asked"] == [("plugin",)]


def test_a_broken_installation_is_all_that_is_told(answers):
    answers["told"]["problems"] = ["vLLM is not installed (this plugin supports it): pip install it"]
    made = found("M")
    assert made["installation"].says == "vLLM is not installed (this plugin supports it)"
    assert made["installation"].remedy == "pip install it"
    assert statuses(made) == {"installation": "problem", "everything else": "skipped"}
    assert not answers["asked"]


def test_a_machine_without_a_gpu(answers, monkeypatch):
    answers["told"]["gpus"] = []
    monkeypatch.setenv("PYTHONPATH", "")
    assert 'eval "$(specattn cpu-env)"' in found()["GPU"].remedy
    monkeypatch.setenv("PYTHONPATH", f"/x:{findings.OVERLAY}")
    assert found()["GPU"].status == "warning"


def test_a_gpu_that_torch_does_not_see(answers):
    answers["told"]["executor"] = "not known: No CUDA GPUs are available"
    assert found()["GPU"].status == "problem"


def test_a_plugin_that_does_not_load(answers):
    answers["plugin"] = {"error": "ImportError: no module named x"}
    made = found("M")
    assert made["plugin in a vLLM process"].says == "ImportError: no module named x"
    assert "memory" not in made and "generation" not in made


def test_what_is_refused_is_told_with_its_remedy(answers):
    answers["config"] = {"error": "kv_cache_dtype = 'fp8': not supported; use 'auto' (ValueError: cannot serve this)"}
    made = found("M")
    assert made["model and options"].status == "problem" and "use 'auto'" in made["model and options"].says
    assert made["model and options"].remedy == "change what is named"
    assert made["generation"].status == "ok"
    answers["config"] |= {"remedy": "give another backend"}
    assert found("M")["model and options"].remedy == "give another backend"


def test_a_folder_that_is_not_there(answers):
    made = found("/no/such/folder", "--max-num-seqs", "4", generate=False)
    assert made["model and options"].says == "there is no folder /no/such/folder"
    assert answers["asked"] == [("plugin",)]


def test_a_gpu_that_is_too_small(answers):
    answers["config"] = SIZES | {"room": 30 * 2**30}
    made = found("M")["memory"]
    assert made.status == "problem" and "lower --max-model-len or --max-num-seqs" in made.remedy
    answers["config"] = SIZES | {"largest": 28 * 2**30}
    assert found("M")["memory"].status == "problem"


def test_a_method_whose_buffers_are_not_known_beforehand(answers):
    answers["config"] = {"says": "M can be served", "unknown": "known once it starts"}
    assert found("M")["memory"] == Finding("memory", "skipped", "known once it starts")


def test_a_probe_that_dies_is_told_by_its_last_line(monkeypatch):
    monkeypatch.setattr(probes.engines, "MODULE", ("/bin/sh", "-c", "echo; exit 3"))
    answer = probes.ask("plugin")
    assert answer["error"] == "the process ended with status 3: it said nothing"


HANGING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({pids!r}, "w").write(f"{{child.pid}} ")
time.sleep(60)
"""


def test_a_probe_that_hangs_is_told_and_leaves_no_child_behind(monkeypatch, tmp_path):
    pids = tmp_path / "pids"
    monkeypatch.setattr(probes.engines, "MODULE", (sys.executable, "-c", HANGING.format(pids=str(pids))))
    monkeypatch.setattr(probes, "SECONDS", 2)
    assert probes.ask("plugin") == {"error": "no answer within 2 s"}
    state = Path(f"/proc/{pids.read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":  # Z: ended, and nobody took note
        assert time.monotonic() < deadline, "the probe's child is still there"
        time.sleep(0.1)


def test_without_the_demo_pair_no_generation_is_tried_and_that_is_no_failure(answers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(installed, "DEMO", tmp_path)
    made = found()["generation"]
    assert made.status == "skipped" and made.says.startswith("not tried: the demo pair is not in this installation")
    assert "`pip install -e .` in a clone" in made.remedy
    assert answers["asked"] == [("plugin",)]
    assert cli.main(["doctor"]) == 0
    assert "do: the wheel leaves the demo pair out" in capsys.readouterr().out


def test_the_command(answers, capsys):
    assert cli.main(["doctor", "--no-generation", "M", "--max-num-seqs", "64"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("ok       installation: specattn-vllm 0.1.0") and "memory: 2.5 GiB of buffers" in text
    assert max(map(len, text.splitlines())) <= command.WIDTH
    assert cli.main(["doctor", "M", "--no-generation", "--json", "--port", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True
    assert answers["asked"][-1] == ("config", "M", "--port", "1")
    for words in (["--", "--port", "1"], ["--json", "--port", "1", "M"], ["--port=1", "M", "--json"]):
        assert cli.main(["doctor", *words]) == 2
        assert "before the model: name the model first" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor", "M", "--help"])
    assert "--no-generation" in capsys.readouterr().out
    answers["generate"] = {"error": "CUDA error"}
    assert cli.main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"] is False
    assert told["findings"][-1]["status"] == "problem" and told["findings"][-1]["says"] == "CUDA error"


def test_the_command_answers_without_what_it_needs(tmp_path):
    """In an installation without pydantic, whose absence is not all that is wrong there."""
    program = "import sys; sys.modules['pydantic'] = None; from specattn_vllm import cli; sys.exit(cli.main(['info']))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert "specattn-vllm" in done.stdout, done.stderr[-2000:]

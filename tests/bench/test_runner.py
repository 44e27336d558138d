"""Engines that work, fail, hang or are there already; the workers are small programs instead of vLLM."""

import argparse
import json
import os
import signal
import sys
import threading
import time

import pytest

from specattn_vllm import cli
from specattn_vllm.bench import command, jobs, runner
from specattn_vllm.bench.schema import NO_ROOM, Job, Report
from specattn_vllm.installed import UserError
from specattn_vllm.tools import engines, models

# What a worker does, by the mode of its job.
WORKER = """
import json, os, subprocess, sys, time
from pathlib import Path
from specattn_vllm.bench.schema import NO_ROOM, EngineResult, Job, Sample
from specattn_vllm.tools.outputs import write_json

job_path, result_path = map(Path, sys.argv[1:])
job = Job.model_validate_json(job_path.read_text())
result = EngineResult(name=job.name, job=job)


def measure(cell):
    sample = Sample(tokens=100, seconds=0.5, rounds=50, tokens_per_round=1)
    found = cell.model_copy(update={"samples": [sample]})
    found.summarise()
    result.cells.append(found)
    write_json(result_path, result.model_dump(mode="json"))


behaviour = json.loads(os.environ["BEHAVIOUR"]).get(job.mode, "work")
print("log of", job.name, os.environ["VLLM_USE_V2_MODEL_RUNNER"], repr(os.environ["VLLM_PLUGINS"]), flush=True)
if behaviour == "raise":
    print("(EngineCore pid=1) ERROR 11-22 09:17:41 [core.py:1] Traceback", flush=True)
    print("(EngineCore pid=1) ValueError: no memory for this", flush=True)
    print("RuntimeError: Engine core initialization failed.", flush=True)
    sys.exit(1)
if "CUDA_VISIBLE_DEVICES" in os.environ:
    print("on GPU", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
if behaviour == "meet":  # ends only while another engine runs
    mine = Path(os.environ["CHILD"]).with_name(job.name)
    mine.touch()
    while len(list(mine.parent.glob("d*"))) < 2:
        time.sleep(0.02)
if behaviour == "vanish":
    os.kill(os.getpid(), 9)
if behaviour == "hang":
    measure(job.cells[0])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["CHILD"]).write_text(str(child.pid))
    time.sleep(600)
if behaviour == "no room":
    result.cells = [cell.model_copy(update={"skipped": "needs a KV cache of 2 tokens"}) for cell in job.cells]
    result.end("failed", NO_ROOM)
    write_json(result_path, result.model_dump(mode="json"))
    sys.exit(0)
for cell in job.cells:
    measure(cell)
result.end("ok")
write_json(result_path, result.model_dump(mode="json"))
"""


def engines_args(words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.engines_arguments(parser)
    return parser.parse_args(words.split())


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(behaviour by mode, **arguments of run_all) -> (report as it was written, names of the engines that ran)."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(engines, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(Job, "worker", [sys.executable, "-P", str(script)])
    monkeypatch.setattr(command, "require", lambda modules: None)
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))

    def run(behaviour: dict | None = None, earlier=None, repeats: int = 3, **arguments):
        monkeypatch.setenv("BEHAVIOUR", json.dumps(behaviour or {}))
        words = f"--shape demo --device cpu --grid 2x1k,1x1k --modes plain,draft-v2,dense --repeats {repeats}"
        args, shape = engines_args(words), models.load_shape("demo")
        report = Report(provenance={"date": "2026-11-22"}, settings=jobs.settings_of(args, shape), engines=[])
        path, ran = tmp_path / "out" / "report.json", []
        if earlier == "resume":
            earlier = runner.earlier_engines(path, report)
        wanted, logs = jobs.make_jobs(args, shape), tmp_path / "logs"
        path.parent.mkdir(exist_ok=True)
        runner.run_all(wanted, report, path, logs, earlier or {}, say=ran.append, **arguments)
        begun = [line.rpartition(": ")[2] for line in ran if line.startswith("engine ")]
        return Report.model_validate_json(path.read_text()), begun

    run.folder = tmp_path
    return run


def statuses(report: Report) -> dict[str, str]:
    return {engine.name: engine.status for engine in report.engines}


def test_every_engine_runs_in_its_own_environment(bench):
    report, _ = bench()
    assert statuses(report) == {"plain": "ok", "draft-v2": "ok", "dense": "ok"}
    assert [[cell.name for cell in engine.cells] for engine in report.engines] == [["2x1k", "1x1k"]] * 3
    logs = {path.stem: path.read_text() for path in (bench.folder / "logs").glob("*.log")}
    assert logs == {
        "plain": "log of plain 1 ''\n",
        "draft-v2": "log of draft-v2 1 ''\n",
        "dense": "log of dense 1 'specattn'\n",
    }
    assert report.engines[0].log == "logs/plain.log"
    assert report.engines[0].provenance == {"date": "2026-11-22"}


def test_one_that_fails_does_not_stop_the_others(bench):
    report, _ = bench({"draft-v2": "raise"})
    assert statuses(report) == {"plain": "ok", "draft-v2": "failed", "dense": "ok"}
    # The first error of the log, not what vLLM says about it afterwards.
    assert report.engines[1].reason == "ValueError: no memory for this"


def test_one_that_is_killed_is_reported_too(bench):
    report, _ = bench({"plain": "vanish"})
    assert statuses(report) == {"plain": "failed", "draft-v2": "ok", "dense": "ok"}
    assert "-9" in report.engines[0].reason


def test_engines_run_at_the_same_time_each_on_a_gpu_of_its_own(bench, monkeypatch):
    monkeypatch.setenv("CHILD", str(bench.folder / "meeting" / "child"))
    (bench.folder / "meeting").mkdir()
    report, _ = bench({"draft-v2": "meet", "dense": "meet"}, gpus=["2", "5"])
    assert statuses(report) == {"plain": "ok", "draft-v2": "ok", "dense": "ok"}
    used = [path.read_text().split("on GPU ")[1].split()[0] for path in (bench.folder / "logs").glob("d*.log")]
    assert sorted(used) == ["2", "5"]


def test_resuming_runs_what_is_missing(bench):
    first, _ = bench({"draft-v2": "raise"})
    second, ran = bench(earlier="resume")
    assert ran == ["draft-v2"]
    assert statuses(second) == {"plain": "ok", "draft-v2": "ok", "dense": "ok"}
    assert second.engines[0] == first.engines[0]


def test_resuming_runs_anew_what_would_run_otherwise(bench):
    bench()
    _, ran = bench(earlier="resume", repeats=4)
    assert ran == ["plain", "draft-v2", "dense"]


def test_resuming_keeps_engines_that_are_not_asked_for_now(bench):
    bench()
    path = bench.folder / "out" / "report.json"
    stored = json.loads(path.read_text())
    stored["engines"][0]["name"] = stored["engines"][0]["job"]["name"] = "plain, earlier"
    path.write_text(json.dumps(stored))
    report, ran = bench(earlier="resume")
    assert ran == ["plain"]
    assert list(statuses(report)) == ["plain, earlier", "plain", "draft-v2", "dense"]


def test_figures_of_something_else_are_not_gone_on_with(bench):
    bench()
    path = bench.folder / "out" / "report.json"
    stored = json.loads(path.read_text())
    stored["settings"]["draft_tokens"] = 7
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="measured with another draft_tokens"):
        bench(earlier="resume")


def test_an_engine_without_room_for_any_cell_has_failed_and_says_how_much_is_missing(bench, monkeypatch, capsys):
    assert run_command(bench, monkeypatch, {"plain": "no room"}) == 1
    report = Report.model_validate_json((bench.folder / "r.json").read_text())
    assert statuses(report) == {"plain": "failed", "dense": "ok"}
    assert report.engines[0].reason == NO_ROOM
    shown = " ".join(capsys.readouterr().out.split())
    assert "plain: failed: no cell fits in the KV cache" in shown and "1x1k needs a KV cache of 2 tokens" in shown
    assert "engine 2 of 2" in shown and "1 of 2 done, about" in shown


def run_command(bench, monkeypatch, behaviour: dict, *more: str) -> int:
    monkeypatch.setenv("BEHAVIOUR", json.dumps(behaviour))
    arguments = ["--shape", "demo", "--device", "cpu", "--grid", "1x1k", "--modes", "plain,dense"]
    return cli.main(["bench", *arguments, "--out", str(bench.folder / "r.json"), *more])


def test_the_exit_status_says_whether_all_ran(bench, monkeypatch, capsys):
    assert run_command(bench, monkeypatch, {"dense": "raise"}) == 1
    assert "no memory for this" in capsys.readouterr().out.replace("\n", " ")
    assert run_command(bench, monkeypatch, {}) == 2
    assert "--resume" in capsys.readouterr().err
    assert run_command(bench, monkeypatch, {}, "--resume") == 0
    assert "200" in capsys.readouterr().out
    assert run_command(bench, monkeypatch, {}, "--resume", "--grid", "2x1k") == 2
    assert "measured with another grid" in capsys.readouterr().err
    assert run_command(bench, monkeypatch, {}, "--overwrite", "--grid", "2x1k") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_end_by_signal_ends_the_engine_and_leaves_a_report(bench, not_running, monkeypatch, capsys, number):
    child = bench.folder / "child"

    def terminate():
        while not child.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=terminate)
    thread.start()
    monkeypatch.setattr(sys, "argv", ["specattn", "bench", "--grid", "1x1k", "--overwrite"])
    assert run_command(bench, monkeypatch, {"plain": "hang"}) == 128 + number
    thread.join()
    report = Report.model_validate_json((bench.folder / "r.json").read_text())
    assert statuses(report) == {"plain": "interrupted"}
    assert not_running(int(child.read_text()))
    shown = capsys.readouterr().out
    assert "interrupted: ended before it was done (log:" in " ".join(shown.split())
    assert "this goes on with it: specattn bench --grid 1x1k --resume" in shown
    assert "interrupted: interrupted" not in shown

"""Engines of an evaluation: which run, in which order, and what is not run again."""

from __future__ import annotations

import json
import sys
import threading

import pytest

from specattn_vllm import cli
from specattn_vllm.evaluation import figures as compute
from specattn_vllm.evaluation import runner
from specattn_vllm.evaluation.results import Report
from specattn_vllm.evaluation.schema import Setting
from specattn_vllm.installed import UserError
from specattn_vllm.tools.interrupts import Terminated

ORDER = ["half", "dense", "quarter"]


@pytest.fixture
def engines(monkeypatch, result_of):
    """Stands in for engines: remembers which settings ran; those named in `engines.broken` fail."""

    class Engines:
        def __init__(self):
            self.ran, self.broken, self.together = [], set(), None
            self.gpus = {}

        def measure(self, job, reference, logs, gpu, stop):
            self.ran.append(job.setting.name)
            self.gpus[job.setting.name] = gpu
            if self.together is not None and not job.setting.is_reference:
                self.together.wait(timeout=10)  # broken, and so an error, if fewer ever run at a time
            if job.setting.name in self.broken:
                return "ValueError: no"
            if job.setting.is_reference:
                reference.mkdir(exist_ok=True)
                (reference / "complete.json").write_text(json.dumps({"job_key": job.key}))
            return result_of(job)

    made = Engines()
    monkeypatch.setattr(runner, "measured", made.measure)
    return made


@pytest.fixture
def jobs(job, half):
    return [job(), job(half), job(Setting(name="quarter", options={"rule": "top_k", "ratio": 0.25}))]


@pytest.fixture
def evaluate(jobs):
    """evaluate(path, jobs): the settings that failed, and the report afterwards."""

    def run(path, jobs=jobs, **more) -> tuple[list[str], Report]:
        earlier = runner.earlier(path, {"context": 100})
        found = Report(provenance={"date": "2026"}, setup={"context": 100}, results=earlier)
        failed = runner.run_all(jobs, found, path, ORDER, say=lambda text: None, **more)
        return failed, Report.model_validate_json(path.read_bytes())

    return run


def test_what_is_measured_is_not_run_again(engines, tmp_path, jobs, evaluate):
    path = tmp_path / "report.json"
    engines.broken = {"quarter"}
    evaluate(path)
    assert engines.ran == ["dense", "half", "quarter"]
    engines.broken, engines.ran = set(), ["dense", "half"]
    _, found = evaluate(path)
    assert engines.ran == ["dense", "half", "quarter"]
    assert [result.name for result in found.results] == ["dense", "half", "quarter"]
    evaluate(path)
    assert len(engines.ran) == 3


def test_results_stand_in_the_order_of_the_settings_whichever_ran_first(engines, tmp_path, jobs, evaluate):
    path = tmp_path / "report.json"
    evaluate(path, [jobs[0], jobs[2]])
    _, found = evaluate(path, jobs[:2])
    assert engines.ran == ["dense", "quarter", "dense", "half"]
    assert [result.name for result in found.results] == ["dense", "half", "quarter"]


def test_the_dense_run_is_made_again_where_its_distributions_are_gone(engines, tmp_path, jobs, evaluate):
    path = tmp_path / "report.json"
    evaluate(path, jobs[:2])
    assert not path.with_suffix(".reference").exists()
    evaluate(path)
    assert engines.ran == ["dense", "half", "dense", "quarter"]


def test_a_setting_that_changed_takes_the_place_of_the_old_one(engines, tmp_path, half, job, jobs, evaluate):
    path = tmp_path / "report.json"
    evaluate(path)
    changed = job(half.model_copy(update={"options": {"rule": "top_k", "ratio": 0.4}}))
    _, found = evaluate(path, [jobs[0], changed])
    assert [(r.name, r.options.get("ratio")) for r in found.results] == [
        ("dense", None),
        ("half", 0.4),
        ("quarter", 0.25),
    ]


def test_a_setting_that_fails_is_named_and_the_others_go_on(engines, tmp_path, evaluate):
    path = tmp_path / "report.json"
    engines.broken = {"half"}
    failed, found = evaluate(path)
    assert failed == ["half"]
    assert [result.name for result in found.results] == ["dense", "quarter"]
    engines.broken = set()
    failed, found = evaluate(path)
    assert failed == [] and engines.ran == ["dense", "half", "quarter", "half"]


def test_as_many_run_at_a_time_as_there_are_gpus_once_the_dense_one_is_done(engines, tmp_path, evaluate):
    engines.together = threading.Barrier(2)
    failed, found = evaluate(tmp_path / "report.json", gpus=["3", "5"])
    assert failed == [] and engines.ran[0] == "dense"
    assert engines.gpus["dense"] == "3" and {engines.gpus["half"], engines.gpus["quarter"]} == {"3", "5"}
    assert [result.name for result in found.results] == ["dense", "half", "quarter"]


@pytest.mark.parametrize(("interrupt", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interrupted_evaluation_says_how_to_go_on(monkeypatch, capsys, tmp_path, interrupt, status):
    def interrupted(*args, **more):
        raise interrupt

    monkeypatch.setattr(runner, "run_all", interrupted)
    words = ["eval", "methods", "--documents", "1", "--context", "64", "--positions", "5", "--device", "cpu"]
    words += ["--out", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["specattn", *words, "--overwrite"])
    assert cli.main([*words, "--overwrite"]) == status
    shown = capsys.readouterr().out
    assert shown.endswith(f"this goes on after the settings in {tmp_path / 'a.json'}: specattn {' '.join(words)}\n")


def test_without_the_dense_run_nothing_else_is_run(engines, tmp_path, jobs):
    engines.broken = {"dense"}
    report, said = Report(provenance={}, setup={}, results=[]), []
    assert runner.run_all(jobs, report, tmp_path / "report.json", ORDER, say=said.append) == ["dense"]
    assert engines.ran == ["dense"]
    assert said[-1] == "no other setting was measured: they are compared with this one"


def test_a_report_about_something_else_is_not_gone_on_with(engines, tmp_path, evaluate):
    path = tmp_path / "report.json"
    evaluate(path)
    with pytest.raises(UserError, match="measured with another context"):
        runner.earlier(path, {"context": 200})
    path.write_text("{}")
    with pytest.raises(UserError, match="is no report"):
        runner.earlier(path, {"context": 100})


def test_the_file_has_the_figures_of_the_table(engines, tmp_path, evaluate):
    path = tmp_path / "report.json"
    _, found = evaluate(path)
    for result in found.results:
        assert result.figures == json.loads(json.dumps(compute.as_json(compute.figures(result, found.dense))))
    written = json.loads(path.read_text())["results"][1]["figures"]
    assert written["kl"] == {"value": pytest.approx(0.01), "interval": [pytest.approx(0.01), pytest.approx(0.01)]}

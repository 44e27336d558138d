"""`specattn eval tasks` without engines: prompts, files of prompts, scores, resuming, and the tables."""

from __future__ import annotations

import json

import pytest

from specattn_vllm import cli
from specattn_vllm.evaluation import runner, settings, tasks, tasks_report, texts
from specattn_vllm.evaluation.schema import Setting
from specattn_vllm.evaluation.tasks_generators import COPIED, GENERATORS, SHOWN
from specattn_vllm.evaluation.tasks_schema import Sample, SampleResult, TaskJob, TaskReport, TaskResult
from specattn_vllm.installed import UserError, demo_folder

HALF = Setting(name="half", options={"rule": "top_k", "ratio": 0.5})
DEPTHS = [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(demo_folder("target")))


@pytest.fixture(scope="module")
def make(tokenizer):
    def made(name: str, lengths=(400,), depths=tuple(DEPTHS), count=1, seed=0) -> list[Sample]:
        return tasks.generate([name], list(lengths), list(depths), count, texts.held_out(), tokenizer, seed)

    return made


def places(prompt: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(prompt)) if prompt[i : i + len(part)] == part]


# Prompts that are made


@pytest.mark.parametrize("task", GENERATORS)
def test_the_answer_stands_in_the_prompt_once_behind_what_the_prompt_ends_in_and_at_its_depth(task, make, tokenizer):
    # How far off the answer may be: it stands anywhere in the lines or the function that are put at the depth.
    tolerance = {"copy": 0.35, "key_value": 0.5}.get(task, 0.2)
    for sample in make(task, lengths=(300, 900)):
        [answer] = sample.answers
        assert sample.prompt[0] == tokenizer("").input_ids[0]
        assert sample.length - 60 < len(sample.prompt) <= sample.length
        # What is asked again, without the line break before it, which may be one token with what was before that.
        shown = {"copy": SHOWN - 1, "identifier": 1}.get(task, 2)
        [place] = places(sample.prompt, sample.prompt[-shown:] + answer)
        assert abs(place / len(sample.prompt) - sample.depth) < tolerance
        assert len(answer) >= 2, "the first token of an answer is the prompt's own pass's"
        assert task != "copy" or len(answer) == COPIED


def test_the_same_arguments_give_the_same_prompts_and_more_of_them_leave_the_others_alone(make):
    one = make("passkey", depths=(0.5,))
    assert make("passkey", depths=(0.5,)) == one
    assert make("passkey", depths=(0.5,), seed=1) != one
    more = make("passkey", lengths=(400, 500), depths=(0.5,), count=2)
    assert more[0] == one[0] and len(more) == 4
    assert len({str(sample.answers) for sample in more}) == 4


@pytest.mark.parametrize("task", ["passkey", "key_value"])
def test_a_prompt_too_short_for_what_is_asked_is_refused(task, make):
    with pytest.raises(UserError, match="has no room for"):
        make(task, lengths=(12,))


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"no 2,000 tokens.*--text"):
        tasks.generate(["passkey"], [1000], [0.5], 1, [("short.py", "x = 1\n")], tokenizer, 0)


def test_code_without_functions_or_repeated_names_is_refused(tokenizer):
    numbers = "\n".join(f"x{n} = {n * 7919 % 1009}" for n in range(900))
    for task, message in (("copy", "no function of"), ("identifier", "no name stands twice")):
        with pytest.raises(UserError, match=f"task '{task}'.*{message}"):
            tasks.generate([task], [400], [0.5], 1, [("numbers.py", numbers)], tokenizer, 0)


# Prompts of a file


def read(tmp_path, tokenizer, *lines: str) -> list[Sample]:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(lines))
    return list(tasks.read_file(path, tokenizer))


def test_a_file_s_prompts_and_answers_are_the_model_s_tokens(tmp_path, tokenizer):
    lines = [
        {"prompt": "x = 4821\nx =", "answer": " 4821"},
        {"prompt": "def f(", "answer": ["self):", "x):"], "task": "head", "length": 8, "depth": 0.5},
    ]
    first, second = read(tmp_path, tokenizer, json.dumps(lines[0]), "", json.dumps(lines[1]))
    assert tokenizer.decode(first.prompt, skip_special_tokens=True) == "x = 4821\nx ="
    assert [tokenizer.decode(answer) for answer in first.answers] == [" 4821"]
    assert [tokenizer.decode(answer) for answer in second.answers] == ["self):", "x):"]
    assert (first.task, first.length, first.depth) == ("file", None, None)
    assert (second.task, second.length, second.depth) == ("head", 8, 0.5)


def test_an_answer_that_the_tokenizer_would_join_to_the_prompt_is_tokens_of_its_own(tmp_path, tokenizer):
    """'pri' and 'nt' are other tokens than 'print': the model has read 'pri', and goes on from there."""
    [sample] = read(tmp_path, tokenizer, json.dumps({"prompt": "pri", "answer": "nt("}))
    assert tokenizer("print(").input_ids[: len(sample.prompt)] != sample.prompt
    assert tokenizer.decode(sample.answers[0]) == "nt("


def test_prompts_that_are_written_are_read_as_they_were(tmp_path, make, tokenizer):
    given, path = make("passkey"), tmp_path / "tasks.jsonl"
    tasks.write_file(given, path, tokenizer)
    for sample, read in zip(given, tasks.read_file(path, tokenizer), strict=True):
        # As text: put together of tokens, a prompt may hold others than a tokenizer makes of it.
        assert tokenizer.decode(read.prompt) == tokenizer.decode(sample.prompt)
        assert [tokenizer.decode(ids) for ids in read.answers] == [tokenizer.decode(ids) for ids in sample.answers]
        assert (read.task, read.length, read.depth) == (sample.task, sample.length, sample.depth)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: Invalid JSON"),
        ('{"prompt": "x"}', "line 2: answer: Field required"),
        ('{"prompt": "", "answer": "y"}', "line 2: prompt: "),
        ('{"prompt": "x", "answer": ""}', "line 2: answer: is empty"),
        ('{"prompt": "x", "answer": []}', "line 2: answer: is empty"),
        ('{"prompt": "x", "answer": ["y", ""]}', "line 2: answer: is empty"),
        ('{"prompt": "x", "answer": "y", "weight": 2}', "line 2: weight: Extra inputs"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_by_its_number(line, message, tmp_path, tokenizer):
    with pytest.raises(UserError, match=message):
        read(tmp_path, tokenizer, '{"prompt": "x", "answer": "y"}', line)


def test_files_without_prompts_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="No such file"):
        list(tasks.read_file(tmp_path / "nowhere.jsonl", tokenizer))
    with pytest.raises(UserError, match="is empty: give it lines of"):
        read(tmp_path, tokenizer, "", " ")


def test_a_prompt_longer_than_the_model_is_refused_by_its_number():
    given = [sample([1] * 90, [2, 3]), sample([1] * 91, [2, 3])]
    tasks.check_lengths(given[:1], 100, "the demo target", 8)
    with pytest.raises(UserError, match=r"prompt 2 \(task 'one'\) takes 101 tokens, 91 of its own.*has 100 positions"):
        tasks.check_lengths(given, 100, "the demo target", 8)


# Scores


def sample(prompt: list[int], *answers: list[int], **more) -> Sample:
    return Sample(**{"task": "one", "prompt": prompt, "answers": list(answers), **more})


@pytest.mark.parametrize(
    ("answers", "made", "exact", "right"),
    [
        ([[5, 6, 7]], [5, 6, 7], True, 1.0),
        ([[5, 6, 7, 8]], [5, 0, 7, 8], False, 0.75),
        ([[5, 6, 7]], [0, 5, 6], False, 0.0),  # in its place, or not at all
        ([[5, 6], [5, 0, 7]], [5, 0, 7], True, 1.0),
        ([[5], [6, 7, 8]], [5, 7, 8], True, 1.0),  # an answer is where the continuation begins
        ([[5, 6, 7], [1, 6, 7]], [1, 6, 0], False, 2 / 3),
    ],
)
def test_scores(answers, made, exact, right):
    found = sample([1], *answers).score(made)
    assert (found.exact, found.right) == (exact, pytest.approx(right))


@pytest.mark.parametrize(
    ("right", "of", "interval"),
    # Newcombe (Statistics in Medicine 17, 1998), table I, method 3.
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_s_interval(right, of, interval):
    assert tasks_report.wilson(right, of) == pytest.approx(interval, abs=1e-4)


# Jobs and reports

SAMPLES = [
    sample([1] * 50, [2, 3], length=50, depth=0.1),
    sample([1] * 60, [4], length=60, depth=0.9),
    sample([1] * 55, [5, 6], task="two", length=60, depth=0.1),
]


def job(setting: Setting = settings.DENSE, samples=SAMPLES) -> TaskJob:
    return TaskJob(
        setting=setting, target="/somewhere/target", draft="/somewhere/draft", models={}, samples=samples,
        draft_tokens=4, batch=2, device="cpu", dtype="float32",
    )  # fmt: skip


def result_of(job: TaskJob, *exact: bool) -> TaskResult:
    return TaskResult(
        name=job.setting.name,
        options=job.setting.options,
        lossless=job.setting.lossless,
        job_key=job.key,
        counts={"kv_read": 1000 if job.setting.is_reference else 250, "kv_full": 1000},
        samples=[SampleResult(exact=right, right=1.0 if right else 0.5, tokens=[1]) for right in exact],
        seconds=1.0,
    )


def report_of(*results: TaskResult) -> TaskReport:
    setup = {
        "samples": [tasks.told(sample) for sample in SAMPLES],
        "draft_tokens": 4,
        "dtype": "float32",
        "models": {"target": {"name": "the demo target"}, "draft": {"name": "the demo draft"}},
    }
    return TaskReport(provenance={"date": "2026-11-25", "cpu": "a CPU"}, setup=setup, results=list(results))


def test_the_engine_has_room_for_the_longest_prompt_its_answer_and_whole_rounds():
    assert job().max_model_len == 61 + 10
    assert job().engine_arguments()["max_model_len"] == 71


def test_a_job_s_key_changes_with_its_prompts():
    assert job().key == job().key
    assert len({job().key, job(HALF).key, job(samples=SAMPLES[:2]).key}) == 3


def test_tables():
    results = result_of(job(), True, True, False), result_of(job(HALF), False, True, True)
    text = tasks_report.markdown(report_of(*results))
    assert "| dense | 100.0% | 100.0% | 2 of 3 (21% to 94%) | 83.3% | reference | reference |" in text
    assert "| half | 25.0% | 25.0% | 2 of 3 (21% to 94%) | 83.3% | 1 | 1 |" in text
    one, two = text.split("Task `one`:")[1].split("Task `two`:")
    assert "| half | 25.0% | 25.0% | 1 of 2 (9% to 91%) | 75.0% | 1 | 0 |" in one
    assert "| half | 25.0% | 25.0% | 1 of 1 (21% to 100%) | 100.0% | 0 | 1 |" in two
    by_length = "| method | 50 | 60 |\n| --- | --- | --- |\n| dense | 1 of 1 | 1 of 2 |"
    assert f"By tokens of context, answered:\n\n{by_length}" in two
    assert "| half | 1 of 2 | 1 of 1 |" in two.split("By depth of the answer")[1]
    assert "3 prompts of 50 to 60 tokens, of which 1 ask for a single token" in text


def test_the_table_command_prints_them(tmp_path, capsys):
    report, path = report_of(result_of(job(), True, True, False)), tmp_path / "report.json"
    path.write_text(report.model_dump_json())
    assert cli.main(["eval", "table", str(path)]) == 0
    assert capsys.readouterr().out == tasks_report.markdown(report)
    assert cli.main(["eval", "table", str(path), "--against", "dense"]) == 2
    assert "is no report of `specattn eval methods`: its kind is not" in capsys.readouterr().err


def test_what_is_measured_is_not_run_again_and_a_failure_costs_the_others_nothing(tmp_path, monkeypatch):
    ran, path = [], tmp_path / "report.json"

    def measure(job, reference, log, gpu):
        ran.append(job.setting.name)
        return "ValueError: no" if job.setting.name == "broken" else result_of(job, True, True, True)

    monkeypatch.setattr(runner, "in_own_process", measure)
    monkeypatch.setattr(runner, "prepare_environment", lambda device: None)
    jobs = [job(), job(HALF.model_copy(update={"name": "broken"})), job(HALF)]
    order = ["dense", "broken", "half"]
    say = {"say": lambda text: None}
    assert runner.run_all(jobs, report_of(), path, order, **say) == ["broken"]
    assert ran == ["dense", "broken", "half"]
    report = report_of(*runner.earlier(path, report_of().setup, TaskReport))
    assert runner.run_all(jobs, report, path, order, **say) == ["broken"]
    assert ran[3:] == ["broken"]
    with pytest.raises(UserError, match="measured with another dtype"):
        runner.earlier(path, {"dtype": "bfloat16"}, TaskReport)
    path.write_text("{}")
    with pytest.raises(UserError, match="no report of `specattn eval tasks`"):
        runner.earlier(path, {}, TaskReport)


# The command line


def test_the_list_names_tasks_and_settings(capsys):
    assert cli.main(["eval", "tasks", "--list", "--only", "specattn"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}\n  " in text for name in (*GENERATORS, "dense", "specattn"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "haystack"], "--task 'haystack': there is no such task; there are 'passkey'"),
        (["--task", "copy", "--file", "x.jsonl"], "--task 'copy' with --file"),
        (["--samples", "0"], "--samples 0: at least 1"),
        (["--file", "nowhere.jsonl"], "--file nowhere.jsonl: No such file"),
        (["--task", "passkey", "--lengths", "9000", "--samples", "1"], "the demo target has 8,192 positions"),
    ],
)
def test_what_cannot_run_is_refused_before_any_engine(arguments, message, capsys):
    assert cli.main(["eval", "tasks", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--depths", "0.5,2"], "0 is the beginning of a prompt, 1 its end"), (["--lengths", "2k"], "no list of numbers")],
)
def test_lists_of_numbers_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "tasks", *arguments])
    assert message in capsys.readouterr().err

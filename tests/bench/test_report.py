"""Tables and picture of a stored report."""

import copy
import json
from pathlib import Path

import pytest

from specattn_vllm import cli
from specattn_vllm.bench import report
from specattn_vllm.bench.schema import Report

FILE = Path(__file__).with_name("test_report.json")


@pytest.fixture
def results() -> dict:
    return json.loads(FILE.read_text())


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines]


def cell_of(results: dict, engine: str, cell: str) -> dict:
    (found,) = [e for e in results["engines"] if e["name"] == engine]
    return next(c for c in found["cells"] if c["name"] == cell)


def test_the_table(results):
    assert rows(report.markdown(Report.model_validate(results))) == [
        [
            "requests x context",
            "plain decoding",
            "draft model, runner V2",
            "draft model, runner V1 (timeout)",
            "specattn 10%",
        ],
        ["---"] * 5,
        # 690 plain; 836 and 850 with a draft model, of which the better one counts.
        ["16 x 32k", "690", "836 (1.21x)", "850 (1.23x)", "2,415 (3.50x, 2.84x)"],
        # The best stock mode is plain decoding here: 90.5 is less than 0.95 of 96, and more than any draft mode.
        ["1 x 32k", "96.0", "60.0 (0.62x)", "-", "90.5 (0.94x, 1.51x)†"],
    ]


def test_what_stands_below_the_table(results):
    text = report.markdown(Report.model_validate(results))
    assert "5 draft tokens, 3.5 tokens a round on average" in text
    assert "NVIDIA H200, vLLM 0.32.0, 2026-11-22." in text
    assert "draft-v1: timeout, took longer than 300 s (--engine-timeout)." in text
    assert "† slower than 0.95 times the best of those." in text
    assert "‡" not in text


def test_rounds_that_differ_stand_below_the_table(results):
    assert "draft tokens, " not in "".join(report.remarks(Report.model_validate(results)))
    for engine in results["engines"]:
        if engine["name"] == "specattn 10%":
            engine["job"] |= {"draft_tokens": 7, "acceptance_length": 4.25}
    text = report.markdown(Report.model_validate(results))
    assert "specattn 10%: 7 draft tokens, 4.25 tokens a round." in text
    assert "draft-v1: 5 draft tokens" not in text


def test_speeds_are_compared_with_those_of_the_same_acceptance(results):
    results["settings"]["acceptance_length"] = [2, 3.5]
    more = []
    for engine in results["engines"]:
        if engine["name"] in ("draft-v2", "specattn 10%"):
            other = copy.deepcopy(engine)
            other["name"] = other["job"]["name"] = f"{engine['name']}, 2 a round"
            other["job"]["acceptance_length"] = 2
            for cell in other["cells"]:
                cell["tokens_per_second"] /= 2
            more.append(other)
    # Runner V1 was measured with 3.5 alone.
    results["engines"] += more
    table = rows(report.markdown(Report.model_validate(results)))
    assert table[0][-2:] == ["draft model, runner V2, 2 a round", "specattn 10%, 2 a round"]
    assert table[2][-2:] == ["418 (0.61x)", "1,208 (1.75x, 2.89x)"]
    assert table[2][-3] == "2,415 (3.50x, 2.84x)"
    text = report.markdown(Report.model_validate(results))
    assert "5 draft tokens, 2 or 3.5 tokens a round on average" in text
    assert "draft tokens, " not in "".join(report.remarks(Report.model_validate(results)))


def test_each_is_compared_with_stock_speculation_by_the_same_drafter(results):
    speeds = {"eagle": 1400.0, "sketch 8%": 2700.0, "sketch-eagle 8%": 2500.0, "sketch-alone 8%": 1600.0}
    template = next(e for e in results["engines"] if e["name"] == "specattn 10%")
    for name, speed in speeds.items():
        engine = copy.deepcopy(template)
        engine["name"] = engine["job"]["name"] = name
        mode = engine["job"]["mode"] = name.split(" ")[0]
        drafter = {"sketch": "{draft}", "sketch-alone": None}.get(mode, "{eagle}")
        engine["job"]["engine_arguments"] = {
            **({"speculative_config": {"model": drafter}} if drafter else {}),
            **({} if mode == "eagle" else {"additional_config": {"specattn": {"method": "sketch"}}}),
        }
        for cell in engine["cells"]:
            cell["tokens_per_second"] = speed if cell["name"] == "16x32k" else 92.0
        results["engines"].append(engine)
    table = rows(report.markdown(Report.model_validate(results)))
    assert table[2][-4:] == ["1,400 (2.03x)", "2,700 (3.91x, 3.18x)", "2,500 (3.62x, 1.79x)", "1,600 (2.32x)"]
    assert table[3][-1] == "92.0 (0.96x)"


@pytest.mark.parametrize(("speed", "losing"), [(91.19, True), (91.21, False)])
def test_losing_is_below_a_share_of_the_best_stock_mode(results, speed, losing):
    cell_of(results, "specattn 10%", "1x32k")["tokens_per_second"] = speed
    assert ("†" in report.markdown(Report.model_validate(results))) is losing


def test_stock_modes_never_lose(results):
    assert "†" not in rows(report.markdown(Report.model_validate(results)))[3][2]


def test_what_is_not_steady_or_not_there_is_marked(results):
    cell_of(results, "plain", "16x32k")["steady"] = False
    skipped = cell_of(results, "specattn 10%", "16x32k")
    for name in ("tokens_per_second", "tokens_per_second_range"):
        del skipped[name]
    skipped["skipped"] = "needs a KV cache of 2 tokens, there is room for 1"
    text = report.markdown(Report.model_validate(results))
    assert rows(text)[2] == ["16 x 32k", "690‡", "836 (1.21x)", "850 (1.23x)", "-"]
    assert "‡ not steady" in text
    assert "specattn 10%, 16x32k: needs a KV cache of 2 tokens" in text


def test_without_plain_decoding_nothing_is_compared_with_it(results):
    results["engines"] = [engine for engine in results["engines"] if engine["name"] != "plain"]
    assert rows(report.markdown(Report.model_validate(results)))[2][1:] == ["836", "850", "2,415 (2.84x)"]


def test_shortened_prompts_and_mixed_machines_are_owned_up_to(results):
    assert "Not all from one machine" not in report.markdown(Report.model_validate(results))
    cell_of(results, "plain", "16x32k")["prompt_tokens"] = 32000
    results["engines"][0]["provenance"] = results["provenance"] | {"gpu": "NVIDIA H100"}
    results["engines"][1]["provenance"] = results["provenance"]
    text = report.markdown(Report.model_validate(results))
    assert "16x32k: prompts of 32,000 tokens" in text
    assert "Not all from one machine" in text


def test_a_report_survives_the_file(results, tmp_path):
    Report.model_validate(results).write(tmp_path / "deep" / "copy.json")
    assert Report.model_validate_json((tmp_path / "deep" / "copy.json").read_text()) == Report.model_validate(results)


def test_the_command_prints_the_same_table(results, capsys):
    assert cli.main(["bench", "table", str(FILE)]) == 0
    assert capsys.readouterr().out == report.markdown(Report.model_validate(results))


@pytest.mark.parametrize("text", [None, "no json", "{}"])
def test_other_files_are_refused(tmp_path, capsys, text):
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    assert cli.main(["bench", "table", str(file)]) == 2
    assert "is no report" in capsys.readouterr().err


def test_of_a_damaged_report_what_is_wrong_is_told(tmp_path, capsys):
    file, given = tmp_path / "damaged.json", json.loads(FILE.read_text())
    file.write_text(json.dumps(given | {"engines": [{"name": 1}]}))
    assert cli.main(["bench", "table", str(file)]) == 2
    assert "engines.0.name: Input should be a valid string; and" in capsys.readouterr().err
    file.write_text(json.dumps(given | {"settings": {}}))
    assert cli.main(["bench", "table", str(file)]) == 2
    assert "cannot be shown: it lacks what such reports have (KeyError: " in capsys.readouterr().err


def test_the_picture(results, tmp_path):
    pytest.importorskip("matplotlib")
    figure = report.draw(Report.model_validate(results))
    (axes,) = figure.axes
    heights = sorted(round(bar.get_height(), 3) for bar in axes.patches)
    assert heights == sorted([1, 1, 1.212, 1.232, 3.5, 0.625, 0.943])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["16x32k", "1x32k"]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "specattn 10%"
    path = tmp_path / "bench.png"
    assert cli.main(["bench", "table", str(FILE), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_plain_decoding_shows_speeds(results):
    pytest.importorskip("matplotlib")
    without = copy.deepcopy(results)
    without["engines"] = without["engines"][1:]
    (axes,) = report.draw(Report.model_validate(without)).axes
    assert max(bar.get_height() for bar in axes.patches) == 2415
    assert axes.get_ylabel() == "tokens per second"

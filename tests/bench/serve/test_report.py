"""The table: what stands in it, what is compared with what, and which cells lose."""

from __future__ import annotations

import json

import pytest

from specattn_vllm import cli
from specattn_vllm.bench.serve import report
from specattn_vllm.bench.serve.schema import Round, RoundResult, ServeJob, ServeReport, ServerResult, Traffic
from specattn_vllm.bench.serve.server import METRICS, STATISTICS, THROUGHPUT, summed_up

SETTINGS = {
    "description": "some model",
    "device": "cuda",
    "input_len": {"1024": 0.75, "8192": 0.25},
    "output_len": 10,
    "request_rate": ["2", "inf"],
    "num_prompts": 4,
    "burstiness": 1.0,
    "goodput": ["ttft:2000"],
    "max_num_seqs": 8,
}
TRAFFIC = Traffic(rounds=[], output_tokens=10, burstiness=1, seed=0, goodput=[])


def server(mode: str, ttft: float, speed: float, drafter: str | None = None, **more) -> ServerResult:
    arguments = {"speculative_config": {"model": drafter, "num_speculative_tokens": 5}} if drafter else {}
    if mode.startswith("sketch"):
        arguments["additional_config"] = {"specattn": {"method": "sketch"}}
    job = ServeJob(
        name=mode, mode=mode, engine_arguments=arguments, environment={}, traffic=TRAFFIC, ready_check_timeout_sec=9
    )
    figures = {"mean_ttft_ms": ttft, "output_throughput": speed, "request_goodput": speed / 10}
    made = RoundResult(rate="2", requests=4, completed=4, total_output_tokens=40, figures=figures)
    return ServerResult(**{"name": mode, "status": "ok", "job": job, "rounds": [made], "runner": "V2"} | more)


def made(*servers: ServerResult, **settings) -> ServeReport:
    source = {"gpu": "NVIDIA H200", "versions": {"vllm": "0.32.0"}, "date": "2026-12-01T10:00:00"}
    return ServeReport(provenance=source, settings=SETTINGS | settings, engines=list(servers))


def row(of: ServeReport, figure: str, rate: str = "2") -> list[str]:
    return next(cells for _, name, *cells in [r for r in report.rows(of) if r[0] == rate] if name == figure)


def test_ratios_say_how_many_times_better_and_what_loses_is_marked():
    found = made(server("plain", 100, 50), server("sketch-alone", 50, 45))
    assert row(found, "TTFT mean, ms") == ["100", "50.0 (2.00x)"]
    assert row(found, "throughput, tokens/s") == ["50.0", "45.0 (0.90x)†"]
    assert "† less than 0.95 times" in report.markdown(found)


def test_ours_loses_to_stock_speculation_with_the_same_drafter_too():
    stock = server("draft-v2", 50, 100, "{draft}")
    found = made(server("plain", 100, 50), stock, server("sketch", 75, 75, "{draft}"))
    assert row(found, "TTFT mean, ms") == ["100", "50.0 (2.00x)", "75.0 (1.33x)†"]
    other = made(server("plain", 100, 50), stock, server("sketch-eagle", 75, 75, "{eagle}"))
    assert row(other, "TTFT mean, ms")[2] == "75.0 (1.33x)"


def test_how_a_server_speculates_stands_below():
    ours = server("sketch", 75, 75, "{draft}")
    assert "sketch: 5 draft tokens a round." in report.remarks(made(ours))
    ours.job.engine_arguments["speculative_config"]["synthetic_acceptance_length"] = 3.5
    assert any("gives 3.5 tokens on average" in line for line in report.remarks(made(ours)))


def test_nothing_good_is_a_loss():
    found = made(server("plain", 100, 50), server("sketch-alone", 100, 0))
    assert row(found, "goodput, requests/s") == ["5.00", "0.00 (0.00x)†"]
    assert row(made(server("plain", 100, 0), server("sketch-alone", 1, 5)), "goodput, requests/s")[1] == "0.50"


def test_what_failed_is_shown():
    ours = server("sketch-alone", 50, 100, status="failed", reason="at inf requests/s: out of memory")
    ours.rounds[0] = ours.rounds[0].model_copy(
        update={"completed": 3, "failed": 1, "errors": ["Bad Request"], "total_output_tokens": 29}
    )
    ours.rounds.append(RoundResult(rate="inf", requests=4, reason="out of memory"))
    found = made(server("plain", 100, 50), ours)
    text = report.markdown(found)
    assert row(found, "completed") == ["4 of 4", "3 of 4‡"]
    assert row(found, "completed", "inf") == ["-", "0 of 4‡"]
    for line in (
        "sketch-alone: failed, at inf requests/s: out of memory.",
        "sketch-alone, 2 requests/s: 1 failed: Bad Request.",
        "sketch-alone, 2 requests/s: 29 tokens came back, and 30 were asked for.",
        "‡ not all requests completed; the figures are of those that did.",
    ):
        assert f"\n{line}\n" in text
    assert "sketch-alone (failed) |" in text.splitlines()[0]


def test_the_caption_says_what_was_asked():
    text = report.markdown(made(server("plain", 100, 50)))
    assert "4 requests at each rate, Poisson arrivals, of 75% 1k, 25% 8k tokens, 10 tokens of answer" in text
    assert "some model; NVIDIA H200, vLLM 0.32.0, 2026-12-01." in text
    assert "Model runner: V2 plain." in text and "On a CPU" not in text
    assert "On a CPU" in report.markdown(made(server("plain", 100, 50), device="cpu"))


def test_the_command_prints_a_report_again(tmp_path, capsys):
    found = made(server("plain", 100, 50), server("sketch-alone", 50, 45))
    found.write(tmp_path / "r.json")
    assert cli.main(["bench", "table", str(tmp_path / "r.json")]) == 0
    assert capsys.readouterr().out == report.markdown(found)
    assert cli.main(["bench", "table", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.png")]) == 2
    assert "only reports of `specattn bench engines` are drawn" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("[]")
    assert cli.main(["bench", "table", str(tmp_path / "other.json")]) == 2


def told(**more) -> dict:
    names = [f"{kind}_{metric}_ms" for metric in METRICS for kind in STATISTICS]
    return (
        dict.fromkeys(names, 1.23456)
        | dict.fromkeys(THROUGHPUT, 7.0)
        | {"completed": 2, "failed": 0, "errors": ["", ""], "duration": 3.0}
        | {"total_input_tokens": 20, "total_output_tokens": 10}
        | more
    )


def test_a_result_of_the_client_is_read():
    of = Round(rate="2", requests=2, file="f")
    found = summed_up(told(request_goodput=None, spec_decode_acceptance_length=2.5), of)
    assert (found.completed, found.failed, found.reason, found.acceptance_length) == (2, 0, None, 2.5)
    assert found.figures["p99_e2el_ms"] == 1.2346 and "request_goodput" not in found.figures
    assert json.loads(found.model_dump_json())["figures"]["output_throughput"] == 7.0


def test_a_round_without_any_answer_has_no_figures():
    """vLLM gives zeros then, which would be the best times of all."""
    traceback = "Traceback (most recent call last):\n  File x\nConnectionError: reset\n"
    found = summed_up(told(completed=0, failed=2, errors=[traceback, traceback]), Round(rate="2", requests=2, file="f"))
    assert not found.figures
    assert found.reason == "none of 2 requests completed: ConnectionError: reset"


@pytest.mark.parametrize(("value", "text"), [(1234.4, "1,234"), (99.96, "100.0"), (12.34, "12.3"), (0.5, "0.50")])
def test_numbers(value, text):
    assert report.number(value) == text

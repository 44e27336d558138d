"""Servers that work, refuse, die, or hang, and their clients: small programs in the place of vLLM."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import pytest

from specattn_vllm import cli
from specattn_vllm.bench.serve import command
from specattn_vllm.bench.serve.schema import ServeReport
from specattn_vllm.tools import engines

# Stands where `python -m vllm.entrypoints.cli.main` looks, and does what BEHAVIOUR says: of 'ours' or 'stock'.
FAKE = """
import http.server, json, os, subprocess, sys, time, urllib.request
from pathlib import Path

behaviour = json.loads(os.environ["BEHAVIOUR"])


def value(name):
    return sys.argv[sys.argv.index(name) + 1]


def serve():
    who = "ours" if "specattn" in sys.argv else "stock"
    does = behaviour.get(who)
    Path(os.environ["SEEN"], who + ".txt").write_text(
        json.dumps({name: os.environ.get(name) for name in ("VLLM_PLUGINS", "TRITON_INTERPRET")})
    )
    if does == "refuse":
        print("(EngineCore pid=1) ValueError: no memory for this", flush=True)
        print("RuntimeError: Engine core initialization failed.", flush=True)
        sys.exit(1)
    if who == "ours":
        print("Using V2 Model Runner", flush=True)
    read = [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/work" and does == "die":
                print("RuntimeError: CUDA out of memory", flush=True)
                os._exit(1)
            if self.path == "/work" and does == "hang":
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                Path(os.environ["SEEN"], "pids").write_text(f"{os.getpid()} {child.pid}")
                time.sleep(600)
            answer = {"/health": "", "/work": json.dumps([who, does])}.get(self.path, "")
            if self.path == "/metrics" and who == "ours":
                read[0] += 1
                answer = "".join(
                    'specattn:kv_bytes_%s_total{by="verification",rank="%d"} %d\\n' % (what, rank, read[0] * n)
                    for what, n in (("read", 20), ("present", 100))
                    for rank in (0, 1)
                )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *parts):
            pass

    http.server.ThreadingHTTPServer(("127.0.0.1", int(value("--port"))), Handler).serve_forever()


def bench():
    sent = [json.loads(line) for line in Path(value("--dataset-path")).read_text().splitlines()]
    address = f"http://127.0.0.1:{value('--port')}/work"
    warming = "warm-up" in value("--result-filename")
    try:
        who, does = ("", None) if warming else json.loads(urllib.request.urlopen(address).read())
    except Exception:
        time.sleep(600)  # that the server is gone is seen by others
    if does == "no client":
        print("ValueError: what a client says")
        sys.exit(1)
    failed = 1 if does == "some" else 0
    done = len(sent) - failed
    result = {"completed": done, "failed": failed, "duration": 2.0, "errors": [""] * done + ["Bad Request"] * failed}
    result["total_input_tokens"] = sum(len(each["prompt"].split()) for each in sent)
    result["total_output_tokens"] = done * sent[0]["output_tokens"]
    for number, metric in enumerate(("ttft", "tpot", "itl", "e2el"), 1):
        for kind in ("mean", "median", "p99"):
            result[f"{kind}_{metric}_ms"] = number * (50 if who == "ours" else 100)
    result |= {"request_throughput": done / 2, "output_throughput": 9, "total_token_throughput": 99}
    result["request_goodput"] = done / 4 if "--goodput" in sys.argv else None
    Path(value("--result-dir"), value("--result-filename")).write_text(json.dumps(result))


{"serve": serve, "bench": bench}[sys.argv[1]]()
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(behaviour, *words) -> (exit status, the report that was written)."""
    package = tmp_path / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SEEN", str(tmp_path))
    monkeypatch.setattr(command, "require", lambda modules: None)
    monkeypatch.setattr(engines, "POLL_SECONDS", 0.02)

    def run(behaviour: dict | None = None, *words: str) -> tuple[int, ServeReport]:
        monkeypatch.setenv("BEHAVIOUR", json.dumps(behaviour or {}))
        out = tmp_path / "r.json"
        asked = "--shape tiny --device cpu --lengths 5:0.5,9:0.5 --output-len 4 --num-prompts 4 --rate 2,inf"
        status = cli.main(["bench", "serve", *asked.split(), "--num-warmups", "2", "--out", str(out), *words])
        return status, ServeReport.model_validate_json(out.read_text())

    run.folder = tmp_path
    return run


def statuses(report: ServeReport) -> dict[str, str]:
    return {engine.name: engine.status for engine in report.engines}


def test_each_server_is_sent_the_same_and_measured(bench, capsys):
    status, report = bench({}, "--goodput", "ttft:100", "tpot:9")
    assert status == 0
    plain, ours = report.engines
    assert [engine.runner for engine in report.engines] == ["V1", "V2"]
    for engine in report.engines:
        assert engine.command.startswith("vllm serve ") and engine.provenance["date"]
        assert [(of.rate, of.completed, of.failed) for of in engine.rounds] == [("2", 4, 0), ("inf", 4, 0)]
        assert engine.warm_up.completed == 2
        assert [of.total_input_tokens for of in engine.rounds] == [28, 28]
        assert engine.job.traffic == plain.job.traffic
    assert plain.rounds[0].figures["mean_ttft_ms"] == 100 and ours.rounds[0].figures["mean_ttft_ms"] == 50
    # Of both ranks, and of the round alone.
    assert ours.rounds[1].kv_read == {"verification": 0.2} and not plain.rounds[1].kv_read
    shown = capsys.readouterr().out
    assert "| 2 | TTFT mean, ms | 100 | 50.0 (2.00x) |" in shown
    assert "server 2 of 2: sketch-alone" in shown and "1 of 2 done, about" in shown
    assert "plain: rate 2 of 2: inf requests/s" in shown
    assert "plain: inf requests/s: 4 of 4 requests, TTFT 100 ms" in shown


def test_stock_vllm_on_a_cpu_has_nothing_of_ours(bench):
    bench()
    seen = {who: json.loads((bench.folder / f"{who}.txt").read_text()) for who in ("stock", "ours")}
    assert seen == {
        "stock": {"VLLM_PLUGINS": "", "TRITON_INTERPRET": None},
        "ours": {"VLLM_PLUGINS": "specattn", "TRITON_INTERPRET": "1"},
    }


@pytest.mark.parametrize(
    ("does", "reason", "rounds"),
    [
        ("refuse", "ValueError: no memory for this", 0),
        ("die", "RuntimeError: CUDA out of memory", 0),
        ("no client", "at 2 requests/s: ValueError: what a client says", 2),
    ],
)
def test_one_that_fails_is_told_with_its_cause_and_the_others_go_on(bench, capsys, does, reason, rounds):
    status, report = bench({"stock": does})
    assert status == 1
    assert statuses(report) == {"plain": "failed", "sketch-alone": "ok"}
    failed, ours = report.engines
    assert failed.reason == reason and len(failed.rounds) == rounds and len(ours.rounds) == 2
    assert (bench.folder / failed.log).is_file()
    assert f"plain: failed, {reason}." in capsys.readouterr().out


def test_requests_that_fail_are_shown(bench, capsys):
    status, report = bench({"ours": "some"})
    assert status == 0 and report.engines[1].rounds[0].failed == 1
    shown = capsys.readouterr().out
    assert (
        "| 2 | completed | 4 of 4 | 3 of 4‡ |" in shown
        and "sketch-alone, 2 requests/s: 1 failed: Bad Request." in shown
    )


def test_resuming_runs_what_is_missing(bench, capsys):
    bench({"ours": "refuse"})
    assert (
        cli.main(["bench", "serve", "--shape", "tiny", "--device", "cpu", "--out", str(bench.folder / "r.json")]) == 2
    )
    assert "--resume goes on with it" in capsys.readouterr().err
    status, report = bench({}, "--resume")
    assert status == 0 and statuses(report) == {"plain": "ok", "sketch-alone": "ok"}
    assert "server 1 of 1: sketch-alone" in capsys.readouterr().out
    assert bench({}, "--resume", "--seed", "1")[0] == 2
    assert "measured with another seed" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_by_signal_keeps_what_was_measured_and_leaves_nothing_running(
    bench, not_running, monkeypatch, capsys, number
):
    pids = bench.folder / "pids"

    def end():
        while not pids.exists() or not pids.read_text():
            time.sleep(0.05)
        # What was measured by then is in the report already.
        written = ServeReport.model_validate_json((bench.folder / "r.json").read_text())
        assert statuses(written) == {"plain": "ok", "sketch-alone": "interrupted"}
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=end)
    thread.start()
    monkeypatch.setattr(sys, "argv", ["specattn", "bench", "serve", "--overwrite"])
    status, report = bench({"ours": "hang"})
    thread.join()
    assert status == 128 + number
    assert statuses(report) == {"plain": "ok", "sketch-alone": "interrupted"}
    assert all(not_running(int(pid)) for pid in pids.read_text().split())
    shown = capsys.readouterr().out
    assert "this goes on with it: specattn bench serve --resume" in shown
    assert "| 2 | completed | 4 of 4 | - |" in shown

"""`specattn bench serve` as it stands: `vllm serve` and `vllm bench serve`, stock and ours, with the demo pair."""

import json
import subprocess
import sys

import pytest

from specattn_vllm.bench.serve import report
from specattn_vllm.bench.serve.schema import ServeReport

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), pytest.mark.xdist_group("server")]


def test_stock_and_ours_side_by_side(tmp_path):
    pytest.importorskip("pandas")
    path = tmp_path / "report.json"
    words = (
        "--modes plain,sketch --lengths 100:0.5,600:0.5 --output-len 12 --num-prompts 4 --rate 8 --num-warmups 2 "
        "--max-num-seqs 4 --draft-tokens 3 --option crossover_tokens=0 --option min_tokens=32 --goodput ttft:60000"
    )
    code = "import sys; from specattn_vllm import cli; sys.exit(cli.main())"
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, "bench", "serve", *words.split(), "--out", str(path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    written = json.loads(path.read_text())
    plain, ours = written["engines"]
    for engine in (plain, ours):
        [made] = engine["rounds"]
        # What the servers themselves counted: the prompts are as long as was asked for, the answers too.
        assert (made["completed"], made["failed"]) == (4, 0)
        assert (made["total_input_tokens"], made["total_output_tokens"]) == (2 * 100 + 2 * 600, 4 * 12)
        assert made["figures"]["request_goodput"] == made["figures"]["request_throughput"] > 0
        assert (tmp_path / engine["log"]).is_file()
    assert ours["runner"] == "V2"
    assert "specattn" not in plain["command"] and "--attention-backend specattn" in ours["command"]
    assert 0 < ours["rounds"][0]["kv_read"]["verification"] < 1 < ours["rounds"][0]["acceptance_length"] <= 4
    # The table is made of these figures.
    shown = report.markdown(ServeReport.model_validate(written))
    assert shown in run.stdout
    for key, title in (("mean_ttft_ms", "TTFT mean, ms"), ("p99_e2el_ms", "E2EL p99, ms")):
        before, after = (engine["rounds"][0]["figures"][key] for engine in (plain, ours))
        cells = f"{report.number(before)} | {report.number(after)} ({before / after:.2f}x)"
        assert f"| 8 | {title} | {cells}" in shown

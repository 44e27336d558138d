"""The whole of `specattn bench` with the demo pair, in real engines, and a worker that cannot start one."""

import argparse
import json
import subprocess
import sys

import pytest

from specattn_vllm.bench import command, jobs, report, runner
from specattn_vllm.bench.schema import EngineResult, Report
from specattn_vllm.tools import models

pytestmark = pytest.mark.engine


def engines_args(words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.engines_arguments(parser)
    return parser.parse_args(words.split())


def test_stock_and_ours_side_by_side(tmp_path):
    path = tmp_path / "report.json"
    arguments = "--shape demo --device cpu --grid 2x512 --modes draft-v2,specattn --kept 0.25 --output-tokens 16"
    more = "--repeats 2 --max-warmups 1 --option sink_tokens=0 --option recent_tokens=0"
    command = [sys.executable, "-P", "-c", "import sys; from specattn_vllm import cli; sys.exit(cli.main())", "bench"]
    run = subprocess.run(
        [*command, *arguments.split(), *more.split(), "--out", str(path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(path.read_text())
    stock, ours = Report.model_validate(results).engines
    for engine in (stock, ours):
        assert [cell.name for cell in engine.cells] == ["2x512"]
        for cell in engine.cells:
            assert cell.tokens_per_second > 0
            # Synthetic acceptance of 3.5 with 5 drafts: three or four tokens, never less or more.
            assert all(3 <= sample.tokens_per_round <= 4 for sample in cell.samples)
    # The same draws in both, so the same rounds: what differs is time alone.
    for before, after in zip(stock.cells, ours.cells, strict=True):
        assert [s.tokens_per_round for s in before.samples] == [s.tokens_per_round for s in after.samples]
        assert [s.rounds for s in before.samples] == [s.rounds for s in after.samples]
    first, second = ours.cells[0].samples
    assert (first.tokens, first.tokens_per_round) != (second.tokens, second.tokens_per_round), "other draws every time"
    for cell in ours.cells:
        assert cell.counts["sparse_rows"] == cell.counts["verify_rows"] > 0
        # The uniform map leaves the first of six layers dense; what is newer than the selection comes on top.
        assert (1 + 5 * 0.25) / 6 < cell.kv_read < 0.4
    assert not any(cell.counts for cell in stock.cells)
    assert "| 2 x 512 |" in report.markdown(Report.model_validate(results))


def test_the_real_worker_reports_what_stops_it(tmp_path):
    """`python -m specattn_vllm.bench.worker` itself, with a job that vLLM cannot even begin."""
    args = engines_args("--shape demo --device cpu --grid 1x1k --modes plain --engine-argument dtype=nosuchtype")
    (job,) = jobs.make_jobs(args, models.load_shape("demo"))
    result = runner.run_job(job, EngineResult, tmp_path)
    assert result.status == "failed"
    assert "dtype" in result.reason


@pytest.mark.parametrize("name", [name for name in models.shape_names() if name != models.DEMO])
def test_vllm_takes_the_arguments_of_every_mode(name, tmp_path, monkeypatch):
    """Configurations only: the models are too large for most machines that run tests."""
    from vllm.engine.arg_utils import EngineArgs

    from specattn_vllm.bench.worker import fill_in

    shape = models.load_shape(name)
    folders = {role: str(path) for role, path in models.model_folders(shape, tmp_path).items()}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    modes = "" if "draft" in shape.configs else "--modes plain,sketch-alone"
    for job in jobs.make_jobs(engines_args(f"--grid 16x32k,4x128k --kept 0.1 --device cuda {modes}"), shape):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", job.environment["VLLM_USE_V2_MODEL_RUNNER"])
        config = EngineArgs(**fill_in(job.engine_arguments, folders)).create_engine_config()
        assert config.model_config.max_model_len == job.engine_arguments["max_model_len"]
        assert config.use_v2_model_runner == (job.mode != "draft-v1")
        assert (config.attention_config.backend is not None) == job.ours
        if job.mode in ("plain", "sketch-alone"):
            assert config.speculative_config is None
        else:
            speculation = config.speculative_config
            assert speculation.uses_draft_model()
            assert speculation.synthetic_acceptance_rates == [1.0, 1.0, 0.5, 0.0, 0.0]
            assert config.load_config.load_format == "dummy"

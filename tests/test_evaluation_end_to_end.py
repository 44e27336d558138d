"""The whole of `specattn eval methods` with the demo pair: engines, a lossless setting, and one that cannot run."""

import json
import subprocess
import sys

import pytest

from specattn_vllm.evaluation.schema import Report

pytestmark = pytest.mark.engine

SETTINGS = [
    {"name": "own drafts", "options": {"method": "vegas", "ratio": 0.1, "min_tokens": 0}},
    {"name": "no map", "options": {"layer_map": "nowhere.json"}},
]


def test_a_target_that_drafts_for_itself_differs_in_nothing_but_its_drafts(tmp_path):
    path, settings = tmp_path / "report.json", tmp_path / "settings.json"
    settings.write_text(json.dumps(SETTINGS))
    command = [sys.executable, "-P", "-c", "import sys; from specattn_vllm import cli; sys.exit(cli.main())", "eval"]
    arguments = "methods --context 300 --positions 20 --documents 2 --free-tokens 40 --dtype float32"
    run = subprocess.run(
        [*command, *arguments.split(), "--settings", str(settings), "--out", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    # The setting that cannot run is named, and costs the others nothing.
    assert run.returncode == 1, run.stdout + run.stderr
    assert "no map: failed: LayerMapError: layer_map = 'nowhere.json' cannot be read" in run.stdout
    assert "failed: no map" in run.stdout
    dense, own = Report.model_validate(json.loads(path.read_text())).results
    assert "| own drafts | 100.0% |" in run.stdout
    for result in (dense, own):
        # 20 positions are four rounds; the token after the prompt is none of theirs.
        assert (result.forced["rounds"], result.forced["sampled_tokens"]) == (8, 40)
        assert result.lossless
        assert 0 < result.free["rounds"] < result.free["sampled_tokens"]
    for before, after in zip(dense.documents, own.documents, strict=True):
        assert after.nll == pytest.approx(before.nll, abs=1e-4)
        assert after.agreement == 1.0
        assert abs(after.kl) < 1e-5
    assert path.with_suffix(".reference").exists(), "for the settings that are to be run again"

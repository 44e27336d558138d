"""The whole of `specattn eval methods` with the demo pair: engines, a lossless setting, one whose selections are known,
and one that cannot run."""

import json
import subprocess
import sys

import pytest

from specattn_vllm.evaluation.results import Report

pytestmark = pytest.mark.engine

SETTINGS = [
    {"name": "rounding", "options": {"method": "dense"}, "other_batches": True},
    {"name": "own drafts", "options": {"method": "vegas", "ratio": 0.1, "min_tokens": 0}},
    {
        "name": "ends",
        "options": {
            "method": "specattn",
            "top_p": 1e-6,
            "min_tokens": 0,
            "sink_tokens": 4,
            "recent_tokens": 50,
            "layer_map": "uniform",
        },
    },
    {"name": "no map", "options": {"method": "specattn", "layer_map": "nowhere.json"}},
]


def test_settings_are_measured(tmp_path):
    path, settings = tmp_path / "report.json", tmp_path / "settings.json"
    settings.write_text(json.dumps(SETTINGS))
    command = [sys.executable, "-P", "-c", "import sys; from specattn_vllm import cli; sys.exit(cli.main())", "eval"]
    arguments = "methods --context 300 --positions 20 --documents 2 --free-tokens 40 --dtype float32"
    run = subprocess.run(
        [*command, *arguments.split(), "--settings", str(settings), "--out", str(path)],
        capture_output=True,
        text=True,
        timeout=540,
    )
    # The setting that cannot run is named, and costs the others nothing.
    assert run.returncode == 1, run.stdout + run.stderr
    assert "no map: failed: LayerMapError: layer_map = 'nowhere.json' cannot be read" in run.stdout
    assert "failed: no map" in run.stdout
    dense, rounding, own, ends = Report.model_validate(json.loads(path.read_text())).results
    assert "| own drafts | 100.0% |" in run.stdout
    # Of the free run, by document, with an interval.
    length = ends.figures["acceptance_length"]
    assert f"| {length['value']:.2f} (" in run.stdout and length["interval"] is not None
    assert sum(document.rounds for document in own.documents) == own.free["rounds"]
    for result in (dense, own):
        # 20 positions are four rounds; the token after the prompt is none of theirs.
        assert (result.forced["rounds"], result.forced["sampled_tokens"]) == (8, 40)
        assert result.lossless
        assert 0 < result.free["rounds"] < result.free["sampled_tokens"]
    # A target that drafts for itself differs in nothing but its drafts.
    for before, after in zip(dense.documents, own.documents, strict=True):
        assert after.nll == pytest.approx(before.nll, abs=1e-4)
        assert after.agreement == 1.0
        assert abs(after.kl) < 1e-5
        assert after.drafts.rounds == 4 and 1 < after.drafts.greedy_tokens <= 5
    # In fp32, other batches round off next to nothing.
    assert 0 <= abs(rounding.figures["kl"]["value"]) < 1e-5 and rounding.figures["agreement"]["value"] == 1.0
    assert rounding.other_batches and not rounding.is_reference
    assert ends.figures["kl_above_rounding"]["value"] == pytest.approx(ends.figures["kl"]["value"], abs=1e-5)
    assert "| KL to dense | KL above rounding |" in run.stdout
    # The first 4 tokens of a context and the 50 before the drafts are read, and the round's own, in all layers but one.
    contexts, layers = [300, 305, 310, 315], 6
    read = sum((layers - 1) * (54 + 5) + context + 5 for context in contexts)
    assert ends.figures["kv_read"] == pytest.approx(read / sum(layers * (context + 5) for context in contexts))
    assert path.with_suffix(".reference").exists(), "for the settings that are to be run again"

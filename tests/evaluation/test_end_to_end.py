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


def test_settings_are_measured_and_what_they_keep_is_recorded(tmp_path):
    path, settings = tmp_path / "report.json", tmp_path / "settings.json"
    settings.write_text(json.dumps(SETTINGS))
    command = [sys.executable, "-P", "-c", "import sys; from specattn_vllm import cli; sys.exit(cli.main())", "eval"]
    arguments = "methods --context 300 --positions 20 --documents 2 --free-tokens 40 --dtype float32 --record-kept"
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
    length = ends.figures.acceptance_length
    assert length.text(".2f") in run.stdout and length.interval is not None
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
    assert 0 <= abs(rounding.figures.kl.value) < 1e-5 and rounding.figures.agreement.value == 1.0
    assert rounding.other_batches and not rounding.is_reference
    assert ends.figures.kl_above_rounding.value == pytest.approx(ends.figures.kl.value, abs=1e-5)
    assert "| KL to dense | KL above rounding |" in run.stdout
    assert dense.kept is own.kept is None
    # Rounds follow the prompt and the token after it; kept are the first 4 tokens and the 50 before the drafts.
    kept, contexts = ends.kept, [300, 305, 310, 315]
    assert (kept.document, kept.contexts) == (0, contexts)
    share = sum(54 / context for context in contexts) / len(contexts)
    assert sorted(set(kept.shares.values())) == pytest.approx([share, 1.0], abs=1e-4)  # the map leaves one dense
    for layer, of_layer in kept.shares.items():
        for context, row in zip(contexts, kept.percentages(layer), strict=True):
            chosen = [position < 4 or position >= context - 50 or of_layer == 1.0 for position in range(context)]
            buckets = [chosen[begin : begin + kept.bucket] for begin in range(0, context, kept.bucket)]
            assert row[: len(buckets)] == [round(100 * sum(bucket) / len(bucket)) for bucket in buckets]
    assert path.with_suffix(".reference").exists(), "for the settings that are to be run again"

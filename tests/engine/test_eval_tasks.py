"""`specattn eval tasks` in whole engines: what is scored is what plain decoding and a pruned target go on with."""

from __future__ import annotations

import json

import pytest

from specattn_vllm import cli
from specattn_vllm.evaluation.tasks_schema import TaskReport
from specattn_vllm.installed import demo_folder

pytestmark = pytest.mark.engine

SETTINGS = [
    {"name": "all of it", "options": {"method": "specattn", "top_p": 1.0}},
    # Of a constant that stands far back nothing is read.
    {
        "name": "the end",
        "options": {"method": "specattn", "top_p": 1e-6, "min_tokens": 0, "sink_tokens": 1, "recent_tokens": 16},
    },
    {"name": "no map", "options": {"method": "specattn", "layer_map": "nowhere.json"}},
]


def test_dense_and_everything_agree_and_the_last_tokens_do_not_know(tmp_path, plain, monkeypatch, capfd):
    from transformers import AutoTokenizer

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    prompts, settings, out = (tmp_path / name for name in ("tasks.jsonl", "settings.json", "report.json"))
    settings.write_text(json.dumps(SETTINGS))
    common = ["eval", "tasks", "--device", "cpu", "--out", str(out), "--settings", str(settings)]
    made = ["--task", "passkey", "--lengths", "300", "--depths", "0.2", "--samples", "3"]
    assert cli.main([*common, *made, "--write", str(prompts)]) == 0
    assert cli.main([*common, "--file", str(prompts)]) == 1
    said = capfd.readouterr().out
    assert "no map: failed: LayerMapError" in said and "failed: no map" in said
    report = TaskReport.model_validate_json(out.read_bytes())
    dense, everything, end = report.results
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(str(demo_folder("target")))
    given = [{"prompt_token_ids": tokenizer(line["prompt"]).input_ids} for line in lines]
    for i, tokens in enumerate(plain(given, 6)):
        sample = dense.samples[i]
        assert sample.tokens == tokens[: len(sample.tokens)] == everything.samples[i].tokens
        assert sample.exact == (tokenizer.decode(sample.tokens) == lines[i]["answer"][0])
    assert sum(sample.exact for sample in dense.samples) >= 2
    assert not any(sample.exact for sample in end.samples)
    assert end.counts["sparse_rows"] > 0 and end.counts["kv_read"] < 0.5 * end.counts["kv_full"]
    read = f"{end.counts['kv_read'] / end.counts['kv_full']:.1%}"
    assert f"| the end | {read} | {read} | 0 of 3" in said

"""The method of docs/add-a-method.md, as it stands there: registered, served, evaluated and listed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from specattn_vllm import cli, methods

pytestmark = pytest.mark.engine
PAGE = (Path(__file__).parents[2] / "docs/add-a-method.md").read_text()


@pytest.fixture
def random_tokens(tmp_path, monkeypatch):
    """Imports the page's file, which registers itself, and forgets it again."""
    (tmp_path / "random_tokens.py").write_text(PAGE.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(methods, "METHODS", methods.METHODS)
    before = dict(methods.METHODS)
    import random_tokens

    yield random_tokens
    methods.METHODS.clear()
    methods.METHODS.update(before)
    del sys.modules["random_tokens"]


def test_it_is_listed(random_tokens, capsys):
    assert cli.main(["methods"]) == 0
    assert "random        each KV head reads tokens at random" in capsys.readouterr().out


@pytest.mark.parametrize("speculates", [True, False])
def test_it_is_served(random_tokens, speculates, engine, greedy, prompts, plain, counts):
    own = {} if speculates else {"speculative_config": None}
    given = prompts([40, 300, 500])
    options = {"method": "random", "min_tokens": 64}
    llm = engine({**options, "ratio": 1.0}, **own)
    assert greedy(llm, given, 12) == plain(given, 12)
    llm = engine({**options, "ratio": 0.3}, **own)
    greedy(llm, given, 12)
    seen = counts(llm)
    assert 0 < seen.sparse_rows < seen.verify_rows
    assert 0.25 < seen.kv_fraction < 0.45


def test_it_is_evaluated(random_tokens, demo_pair, prompts, tmp_path):
    """In this process: those of `specattn eval` find a method by its entry point."""
    from specattn_vllm.evaluation import engine as evaluation
    from specattn_vllm.evaluation.job import Job
    from specattn_vllm.evaluation.settings import Setting

    documents = [prompt["prompt_token_ids"] for prompt in prompts([320, 320])]
    found = {}
    for name, options in (
        ("dense", {"method": "dense"}),
        ("random", {"method": "random", "ratio": 0.3, "min_tokens": 0}),
    ):
        job = Job(
            setting=Setting(name=name, options=options),
            target=demo_pair[0],
            draft=demo_pair[1],
            models={"target": {"name": "target"}, "draft": {"name": "draft"}},
            draft_tokens=4,
            device="cpu",
            dtype="float32",
            engine_options={"max_num_seqs": 2},
            batch=2,
            context=300,
            positions=10,
            free_tokens=8,
            documents=documents,
        )
        found[name] = evaluation.run(job, tmp_path).result
    assert found["random"].forced["sparse_rows"] > 0
    assert found["random"].documents[0].kl > found["dense"].documents[0].kl + 0.01

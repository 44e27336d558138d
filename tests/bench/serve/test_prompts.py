"""Requests: as many tokens as were asked for, by the tokenizer that serves them, and the same for every server."""

from __future__ import annotations

import json
import random

import pytest

from specattn_vllm.bench.serve.prompts import Corpus, random_words, write_rounds, write_tokenizer
from specattn_vllm.evaluation import texts
from specattn_vllm.installed import UserError, demo_folder
from specattn_vllm.tools import models

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def demo():
    return transformers.AutoTokenizer.from_pretrained(demo_folder("target"))


@pytest.fixture
def corpus(demo):
    return Corpus(demo, [text for _, text in list(texts.held_out())[:2]])


def requests(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"requests-{name}.jsonl").read_text().splitlines()]


def test_prompts_of_text_have_the_tokens_that_were_asked_for(demo, corpus, tmp_path):
    rounds, digests = write_rounds(corpus, {40: 0.5, 700: 0.5}, {"warm-up": 2, "inf": 8}, 5, 0, tmp_path)
    assert [(of.rate, of.requests, of.file) for of in rounds] == [
        ("warm-up", 2, "requests-warm-up.jsonl"),
        ("inf", 8, "requests-inf.jsonl"),
    ]
    sent = requests(tmp_path, "inf")
    # With the token that the tokenizer puts in front, as the server counts.
    assert sorted(len(demo(each["prompt"]).input_ids) for each in sent) == [40] * 4 + [700] * 4
    assert {each["output_tokens"] for each in sent} == {5}
    beginnings = {each["prompt"][:60] for each in sent + requests(tmp_path, "warm-up")}
    assert len(beginnings) == 10, "one prompt begins as another, so it would be found in the prefix cache"
    assert digests["inf"] != digests["warm-up"]


def test_the_same_seed_makes_the_same_requests(demo, tmp_path):
    text = [next(texts.held_out())[1]]
    made = [write_rounds(Corpus(demo, text), {50: 1.0}, {"2": 6}, 4, seed, tmp_path)[1] for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_a_prompt_may_go_on_at_the_beginning_of_the_text(demo, corpus):
    length = len(corpus._ids) - 5
    assert len(demo(corpus(length, random.Random(3))).input_ids) == length
    with pytest.raises(UserError, match="give more"):
        corpus(len(corpus._ids) + 1, random.Random(0))


def test_random_weights_have_words(tmp_path):
    """The longest is longer than what a prompt has for each token: vLLM refuses more characters than that."""
    size = models.load_shape("llama-8b-1b").vocab_size
    write_tokenizer(tmp_path, size, 131072)
    (tmp_path / "config.json").write_text(json.dumps(models.load_shape("llama-8b-1b").configs["target"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = random_words(size)(1000, random.Random(0))
    ids = tokenizer(prompt).input_ids
    assert len(ids) == 1000 and min(ids) >= 16
    assert tokenizer.decode(ids) == prompt
    assert len(prompt) < 1000 * max(map(len, tokenizer.get_vocab()))

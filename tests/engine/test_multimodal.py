"""Multimodal models that are served for text alone."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore"),
    # Not in this project's own environment for CPUs.
    pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM's multimodal models need torchvision"),
]

NEW_TOKENS = 16
OPTIONS = {"method": "sketch", "ratio": 0.2, "min_tokens": 40, "recent_tokens": 16, "crossover_tokens": 0}


@pytest.mark.parametrize("name", ["qwen3-vl", "gemma3-vl"])
def test_text_is_served_as_by_stock_vllm(name, family, engine, counts, sketch_audit, answers, same):
    generator = torch.Generator().manual_seed(0)
    prompts = [{"prompt_token_ids": torch.randint(2, 512, (n,), generator=generator).tolist()} for n in (9, 127, 260)]
    arguments = {"skip_tokenizer_init": True, "max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 4}
    arguments |= {"target": family(name), "language_model_only": True, "speculative_config": None}
    plain = answers(engine(None, **arguments), prompts, NEW_TOKENS)
    llm = engine(OPTIONS, **arguments)
    assert all(map(same, plain, answers(llm, prompts, NEW_TOKENS, exact=True)))
    assert sketch_audit.pruned == 0
    answers(llm, prompts, NEW_TOKENS)
    seen = counts(llm)
    assert sketch_audit.pruned > 20 and 0 < seen.sparse_rows < seen.verify_rows

"""Pairs of models whose shapes differ: each gives the tokens of plain decoding when nothing is dropped."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine

VOCABULARY = 512
NEW_TOKENS = 8

# Nothing dropped; and some of it.
EXACT = {
    "specattn": {"top_p": 1.0},
    "sts": {"method": "sts", "ratio": 1.0},
}
PRUNED = {
    "specattn": {"top_p": 0.7, "min_tokens": 16, "recent_tokens": 8},
    "sts": {"method": "sts", "ratio": 0.25, "min_tokens": 16, "recent_tokens": 8},
}


def _save(folder, kind: str, *, layers: int, heads: int, kv_heads: int, head_dim: int, seed: int) -> str:
    """A tiny random model; its attention is far from uniform, so that a wrong page table changes the tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    torch.manual_seed(seed)
    shape = config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    model(shape).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def random_prompts():
    import torch

    generator = torch.Generator().manual_seed(0)
    return [
        {"prompt_token_ids": torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()}
        for n in (9, 127, 128, 300, 450)
    ]


@pytest.mark.parametrize(
    ("method", "target", "draft"),
    [
        # Llama-3.1-8B with Llama-3.2-1B: the draft's heads are half as wide, so vLLM makes two attention groups.
        pytest.param(
            "specattn",
            ("llama", dict(layers=4, heads=8, kv_heads=2, head_dim=128)),
            ("llama", dict(layers=2, heads=8, kv_heads=2, head_dim=64)),
            id="draft-heads-narrower",
        ),
        # Same cache shape but other query heads: groups split by the number of query heads.
        pytest.param(
            "specattn",
            ("llama", dict(layers=3, heads=8, kv_heads=2, head_dim=64)),
            ("llama", dict(layers=2, heads=2, kv_heads=2, head_dim=64)),
            id="draft-fewer-query-heads",
        ),
        pytest.param(
            "specattn",
            ("llama", dict(layers=3, heads=4, kv_heads=4, head_dim=64)),
            ("llama", dict(layers=5, heads=4, kv_heads=1, head_dim=64)),
            id="draft-fewer-kv-heads-more-layers",
        ),
        # Qwen3-8B with Qwen3-0.6B: norms on queries and keys, head size independent of the width.
        pytest.param(
            "specattn",
            ("qwen3", dict(layers=3, heads=4, kv_heads=2, head_dim=128)),
            ("qwen3", dict(layers=2, heads=4, kv_heads=2, head_dim=128)),
            id="qwen3",
        ),
        # Selections per head of models with other numbers of KV heads.
        pytest.param(
            "sts",
            ("llama", dict(layers=3, heads=4, kv_heads=4, head_dim=64)),
            ("llama", dict(layers=2, heads=4, kv_heads=2, head_dim=64)),
            id="sts-draft-fewer-kv-heads",
        ),
        pytest.param(
            "sts",
            ("llama", dict(layers=3, heads=4, kv_heads=2, head_dim=128)),
            ("llama", dict(layers=2, heads=8, kv_heads=4, head_dim=64)),
            id="sts-draft-more-and-narrower-kv-heads",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_pairs_of_other_shapes(method, target, draft, tmp_path, engine, greedy, random_prompts, audit, counts):
    models = {
        "target": _save(tmp_path / "target", target[0], **target[1], seed=0),
        "draft": _save(tmp_path / "draft", draft[0], **draft[1], seed=1),
    }
    shared = dict(skip_tokenizer_init=True, max_model_len=512)
    expected = greedy(engine(None, target=models["target"], **shared), random_prompts, NEW_TOKENS)
    audit.owner.clear()
    llm = engine(EXACT[method], **models, **shared)
    assert greedy(llm, random_prompts, NEW_TOKENS) == expected
    seen = counts(llm)
    assert seen.sparse_rows == seen.verify_rows > 0
    llm = engine(PRUNED[method], **models, **shared)
    greedy(llm, random_prompts, NEW_TOKENS)
    seen = counts(llm)
    assert seen.sparse_rows == seen.verify_rows > 0
    assert seen.kv_read < seen.kv_full

"""What `specattn eval` measures in an engine, against the same computed in plain PyTorch.

The other computation shares nothing with the engine but the weights and the shipped layer map: transformers' models run
once over the whole text, the draft for its attention, the target with a mask per layer that is made of it round by
round. If forcing led the engine anywhere else than through the text, if selections were a round late or early, or if
logits were taken from the wrong place, the two would not agree.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.engine,
    # Both sides compute in fp32; on CUDA vLLM lets products be rounded to 10 bits.
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares fp32 on a CPU"),
]

CONTEXT, POSITIONS, STEPS = 330, 33, 4  # positions are no whole number of rounds
FREE = 12  # tokens of a run that nothing leads
SINK, RECENT, RATIO = 4, 16, 0.1
PRUNED = {
    "method": "specattn",
    "rule": "top_k",
    "ratio": RATIO,
    "min_tokens": 0,
    "sink_tokens": SINK,
    "recent_tokens": RECENT,
    "combine": "sum",
}

# A target that drafts for itself, from the first and the last tokens: no attention to compute.
WINDOW = {
    "method": "streamingllm",
    "ratio": RATIO,
    "min_tokens": 0,
    "sink_tokens": SINK,
    "recent_tokens": RECENT,
}


def keep(mass: list[float], ratio: float) -> list[bool]:
    """The heaviest tokens up to that share of the context, the first and the last always."""
    length = len(mass)
    forced = {p for p in range(length) if p < SINK or p >= length - RECENT}
    budget = max(-(-length * min(round(ratio * 65536), 65536) // 65536), len(forced))
    others = sorted(set(range(length)) - forced, key=lambda p: (mass[p], p), reverse=True)
    kept = forced | set(others[: budget - len(forced)])
    return [p in kept for p in range(length)]


@torch.no_grad()
def plain_pytorch(folders: tuple[str, str], layer_map: dict, text: list[int]) -> tuple:
    """Log-probabilities [whole rounds, vocabulary] of the dense target and the pruned one, and the share of KV read."""
    from transformers import AttentionInterface, LlamaForCausalLM

    rounds = -(-POSITIONS // (STEPS + 1))
    ids = torch.tensor([text[: CONTEXT + rounds * (STEPS + 1)]])
    target, draft = (
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager") for folder in folders
    )
    attentions = draft(ids, output_attentions=True).attentions
    size = ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    allowed, read, full = [], 0, 0
    for source in layer_map["layers"]:
        mask = causal.clone()
        for begin in range(CONTEXT, size, STEPS + 1):
            rows = range(begin, begin + STEPS + 1)
            if source is not None:
                # Draft step s attends from the s-th token of the round; what is newer than the round's context stays.
                steps = [attentions[source][0, :, row, :begin].mean(0) for row in rows[:STEPS]]
                mass = sum(steps) / STEPS
                mask[begin : begin + STEPS + 1, :begin] &= torch.tensor(keep(mass.tolist(), RATIO))
            read += int(mask[rows[-1]].sum())
            full += rows[-1] + 1
        allowed.append(mask)
    dense = target(ids).logits[0]

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        grouped = query[0].unflatten(0, (key.shape[1], -1))
        logits = torch.einsum("hgqd,hkd->hgqk", grouped, key[0]).mul(scaling)
        weights = logits.masked_fill(~allowed[module.layer_idx], -torch.inf).softmax(-1)
        return torch.einsum("hgqk,hkd->qhgd", weights, value[0]).flatten(1, 2)[None], None

    AttentionInterface.register("pruned", attend)
    target = LlamaForCausalLM.from_pretrained(folders[0], dtype=torch.float32, attn_implementation="pruned")
    pruned = target(ids).logits[0]

    span = slice(CONTEXT, size)
    return *(logits[span].double().log_softmax(-1) for logits in (dense, pruned)), read / full


def windowed(allowed: torch.Tensor):
    """An attention function of transformers that reads what a mask [T, T] allows."""

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        grouped = query[0].unflatten(0, (key.shape[1], -1))
        logits = torch.einsum("hgqd,hkd->hgqk", grouped, key[0]).mul(scaling).masked_fill(~allowed, -torch.inf)
        return torch.einsum("hgqk,hkd->qhgd", logits.softmax(-1), value[0]).flatten(1, 2)[None], None

    return attend


@torch.no_grad()
def drafting(folders: tuple[str, str], text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rounds, K, vocabulary] of the drafts: of the draft model, and of the target that drafts for itself from
    the first and the last tokens of what was verified, and from the round's own."""
    from transformers import AttentionInterface, LlamaForCausalLM

    draft = LlamaForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    AttentionInterface.register("windowed", lambda *args, **kwargs: None)
    target = LlamaForCausalLM.from_pretrained(folders[0], dtype=torch.float32, attn_implementation="windowed")
    begins = range(CONTEXT, CONTEXT + -(-POSITIONS // (STEPS + 1)) * (STEPS + 1), STEPS + 1)
    whole = draft(torch.tensor([text])).logits[0]
    by_draft = torch.stack([whole[begin : begin + STEPS] for begin in begins])
    by_itself = []
    for begin in begins:
        size = begin + STEPS
        allowed = torch.ones(size, size, dtype=torch.bool).tril()
        kept = keep([0.0] * begin, RATIO)
        allowed[begin:, :begin] &= torch.tensor(kept)
        AttentionInterface.register("windowed", windowed(allowed))
        by_itself.append(target(torch.tensor([text[:size]])).logits[0, begin:])
    return by_draft, torch.stack(by_itself)


def acceptance(target: torch.Tensor, draft: torch.Tensor) -> tuple[np.ndarray, float, float]:
    """Of logits [rounds, K, vocabulary]: what is accepted of each draft, tokens a round, and the same greedily."""
    overlap = torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1)
    same = (target.argmax(-1) == draft.argmax(-1)).float()
    tokens, greedy = ((1 + accepted.cumprod(1).sum(1)).mean().item() for accepted in (overlap, same))
    return overlap.mean(0).numpy(), tokens, greedy


@torch.no_grad()
def oracle(folder: str, text: list[int]) -> tuple[torch.Tensor, float]:
    """Log-probabilities [POSITIONS, vocabulary] of a target each KV head of which reads what its own attention in the
    round's rows is heaviest on, and the share of KV read."""
    from transformers import AttentionInterface, LlamaForCausalLM

    size = CONTEXT + -(-POSITIONS // (STEPS + 1)) * (STEPS + 1)
    read = full = 0

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        nonlocal read, full
        heads = key.shape[1]
        scores = torch.einsum("hgqd,hkd->hgqk", query[0].unflatten(0, (heads, -1)), key[0]) * scaling
        scores = scores.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), -torch.inf)
        weights = scores.softmax(-1)
        for begin in range(CONTEXT, size, STEPS + 1):
            rows = slice(begin, begin + STEPS + 1)
            count = -(-begin * round(RATIO * 65536) // 65536)
            for head in range(heads):
                dropped = weights[head, :, rows, :begin].mean((0, 1)).argsort(descending=True)[count:]
                scores[head, :, rows, dropped] = -torch.inf
                read += count + STEPS + 1
                full += begin + STEPS + 1
        out = torch.einsum("hgqk,hkd->qhgd", scores.softmax(-1), value[0])
        return out.flatten(1, 2)[None], None

    AttentionInterface.register("oracle", attend)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="oracle")
    logits = model(torch.tensor([text[:size]])).logits[0, CONTEXT : CONTEXT + POSITIONS]
    return logits.double().log_softmax(-1), read / full


@torch.no_grad()
def favourites(folder: str, ids: list[int]) -> list[int]:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([ids])).logits[0].argmax(-1).tolist()


def test_figures_are_those_of_plain_pytorch(demo_pair, prompts, tmp_path):
    from specattn_vllm.evaluation.engine import run
    from specattn_vllm.evaluation.job import Job, text_tokens
    from specattn_vllm.evaluation.schema import Setting

    length = text_tokens(CONTEXT, POSITIONS, STEPS)
    texts = [prompt["prompt_token_ids"] for prompt in prompts([length] * 3)]
    jobs = [
        Job(
            setting=Setting(name=name, options=options, baseline=baseline),
            target=demo_pair[0],
            draft=demo_pair[1],
            models={},
            documents=texts,
            context=CONTEXT,
            positions=POSITIONS,
            draft_tokens=STEPS,
            free_tokens=FREE,
            batch=2,  # fewer than documents, so that a slot is taken over
            device="cpu",
            dtype="float32",
        )
        for name, options, baseline in (
            ("dense", {"method": "dense"}, None),
            ("pruned", PRUNED, None),
            ("oracle", {"method": "dense"}, {"name": "oracle", "ratio": RATIO}),
            ("own drafts", WINDOW, None),
        )
    ]
    layer_map = json.loads((Path(__file__).parents[2] / "configs/demo.json").read_text())
    expected = [(*plain_pytorch(demo_pair, layer_map, text), *oracle(demo_pair[0], text)) for text in texts]
    runs = {}
    for job in jobs:
        runs[job.setting.name] = run(job, tmp_path)
    for number, (dense, pruned, _, best, _) in enumerate(expected):
        true = dense[:POSITIONS]
        following = torch.tensor(texts[number][CONTEXT + 1 : CONTEXT + 1 + POSITIONS])[:, None]
        by_name = {"dense": dense, "oracle": best, "pruned": pruned}
        for name, logprobs in by_name.items():
            logprobs = logprobs[:POSITIONS]
            found = runs[name].scores
            assert found.nll[number] == pytest.approx(-logprobs.gather(1, following)[:, 0].numpy(), abs=1e-3), name
            kl = (true.exp() * (true - logprobs)).sum(-1).numpy()
            assert found.kl[number] == pytest.approx(kl, abs=1e-3), name
            agrees = (logprobs.argmax(-1) == true.argmax(-1)).numpy()
            assert found.agrees[number].tolist() == agrees.tolist(), name
            # Something that a wrong selection would not pass by chance.
            assert name == "dense" or kl.mean() > 0.002, name
    assert not runs["pruned"].scores.agrees.all(), "pruning changes some choice in the texts, if not in each"
    for number, text in enumerate(texts):
        dense, pruned, *_ = expected[number]
        by_draft, by_itself = drafting(demo_pair, text)
        for name, target, draft in (
            ("dense", dense, by_draft),
            ("pruned", pruned, by_draft),
            ("own drafts", dense, by_itself),
        ):
            told = runs[name].acceptance.results()[number]
            rounds = target.unflatten(0, (-1, STEPS + 1))[:, :STEPS].float()
            overlap, tokens, greedy = acceptance(rounds, draft)
            assert told.rounds == len(rounds) == 7
            assert told.accepted == pytest.approx(overlap, abs=1e-3), name
            assert (told.tokens, told.greedy_tokens) == pytest.approx((tokens, greedy), abs=2e-3), name
    own, drafted = (runs[name].result.documents[0].drafts.accepted for name in ("own drafts", "dense"))
    assert own != pytest.approx(drafted, abs=0.05), "what reads a part of a model is not what another model is"
    counted = runs["pruned"].result.forced
    assert counted["sparse_rows"] == counted["verify_rows"] == counted["rounds"] == 3 * 7
    assert counted["kv_read"] / counted["kv_full"] == pytest.approx(np.mean([e[2] for e in expected]), abs=2e-3)
    counted = runs["oracle"].result.forced
    assert counted["kv_read"] / counted["kv_full"] == pytest.approx(np.mean([e[4] for e in expected]), abs=1e-3)
    # The free run is no forced one: some drafts were rejected, and what comes out is the target's own choice.
    assert [len(tokens) for tokens in runs["pruned"].free_tokens] == [FREE] * 3
    free = runs["pruned"].result.free
    assert free["rounds"] < free["sampled_tokens"] < 5 * free["rounds"]
    by_document = runs["pruned"].result.documents
    assert sum(document.rounds for document in by_document) == free["rounds"]
    assert sum(document.sampled_tokens for document in by_document) == free["sampled_tokens"]
    # The first token is the prompt's pass's; of the last round, some may be more than was asked for.
    assert all(FREE - 1 <= document.sampled_tokens < FREE + STEPS for document in by_document)
    own = favourites(demo_pair[0], texts[0][:CONTEXT] + runs["dense"].free_tokens[0])
    assert own[CONTEXT - 1 : -1] == runs["dense"].free_tokens[0]

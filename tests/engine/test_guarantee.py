"""A guarantee in whole engines: KV heads that may lose too much read everything, and what the others lose is little."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SKETCH = {"method": "sketch", "ratio": 0.1, "min_tokens": 16, "recent_tokens": 8}
ALONE = {"speculative_config": None}


class Looked(list):
    read = 0
    """Entries that were read: selections, and then the whole contexts of heads that fell."""


@pytest.fixture
def looked(monkeypatch):
    """Of each checked (KV head, layer, row): whether it fell, the largest true loss of its query rows before, and how
    far its logsumexp is from that over everything after."""
    from specattn_vllm.sketch.layer import LayerSketch

    seen = Looked()
    confirm = LayerSketch.confirm

    def watch(self, step, batch, out, lse):
        before, selected = lse.clone(), self.sketch.kept[self.index].clone()
        confirm(self, step, batch, out, lse)
        query, kv_cache, block_table, seq_lens, starts, scale = batch
        guarantee, block_size, size = self.sketch.guarantee, kv_cache.shape[2], query.shape[2]
        group = query.shape[1] // kv_cache.shape[1]
        for r in range(step.num_rows):
            length, first, end = int(seq_lens[r]), int(starts[r]), int(starts[r + 1])
            if guarantee.positions[r, 0, 0] < 0:
                continue
            p = torch.arange(length, device=query.device)
            blocks = block_table[r, p // block_size].long()
            for head in range(kv_cache.shape[1]):
                mine = slice(head * group, (head + 1) * group)
                keys = kv_cache[blocks, head, p % block_size, :size]
                logits = scale * query[first:end, mine] @ keys.T
                later = p > length - (end - first) + torch.arange(end - first, device=p.device)[:, None]
                full = logits.masked_fill(later[:, None], -torch.inf).logsumexp(-1)
                loss = float((1 - (before[first:end, mine] - full).exp()).max())
                apart = float((lse[first:end, mine] - full).abs().max())
                fell = bool(guarantee.fallen[self.index, r, head])
                seen.append((fell, loss, apart))
                seen.read += int(selected[r, head]) + (length if fell else 0)

    monkeypatch.setattr(LayerSketch, "confirm", watch)
    return seen


@pytest.mark.parametrize("drafter", [{}, ALONE], ids=["draft model", "alone"])
def test_heads_that_may_lose_too_much_read_everything(drafter, engine, greedy, prompts, counts, looked):
    llm = engine(SKETCH | {"epsilon": 0.2}, **drafter)
    greedy(llm, prompts([300, 420]), 16)
    found = counts(llm)
    fallen = [(loss, apart) for fell, loss, apart in looked if fell]
    held = [loss for fell, loss, _ in looked if not fell]
    assert len(fallen) > 20 and len(held) > 20
    assert (found.heads_checked, found.heads_fallen) == (len(looked), len(fallen))
    # What fell is dense: its logsumexp is that of everything.
    assert max(apart for _, apart in fallen) < 1e-3
    # Who loses more than epsilon is found, and few of the others are taken for it.
    lossy = [fell for fell, loss, _ in looked if loss > 0.2]
    assert sum(lossy) >= 0.95 * len(lossy) and len(lossy) > 20
    assert sum(loss < 0.05 for loss, _ in fallen) < 0.1 * len(looked)
    assert found.kv_read == looked.read + found.heads_checked * 32, "and half of the drawn entries, which are keys"


def test_nothing_may_be_lost_is_plain_decoding(engine, greedy, plain, prompts, counts):
    texts = prompts([260, 420])
    wanted = plain(texts, 24)
    llm = engine(SKETCH | {"epsilon": 1e-9, "audit_share": 1.0})
    assert greedy(llm, texts, 24) == wanted
    found = counts(llm)
    assert found.heads_fallen == found.heads_checked > 0
    # Audits come after the guarantee: all of the mass is read.
    [report] = llm.collective_rpc("specattn_audit")
    assert all(layer["retained_mean"] > 0.9999 for layer in report.values())


def test_anything_may_be_lost_is_the_selection_alone(engine, greedy, prompts, counts):
    texts = prompts([260, 420])
    llm = engine(SKETCH, **ALONE)
    wanted, read = greedy(llm, texts, 24), counts(llm).kv_read
    llm = engine(SKETCH | {"epsilon": 0.9999}, **ALONE)
    assert greedy(llm, texts, 24) == wanted
    found = counts(llm)
    assert found.heads_fallen == 0 < found.heads_checked
    assert found.kv_read == read + found.heads_checked * 64 // 2, "the selection once, and the drawn keys"


def test_rows_that_read_everything_are_not_checked(engine, prompts, counts):
    from vllm import SamplingParams

    llm = engine(SKETCH | {"epsilon": 0.2, "min_tokens": 100}, **ALONE)
    extra = ({"specattn": "exact"}, None, None)
    wanted = [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, extra_args=more) for more in extra]
    llm.generate(prompts([400, 60, 500]), wanted, use_tqdm=False)
    found = counts(llm)
    assert (found.verify_rows, found.sparse_rows) == (15, 5)
    layers_and_heads = found.heads_checked // 5
    assert layers_and_heads * 5 == found.heads_checked > 0
    assert found.kv_full % layers_and_heads == 0

"""Audits in whole engines: the measured mass is that of the target's attention on what its verification read."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.engine

OPTIONS = {"top_p": 0.5, "min_tokens": 16, "recent_tokens": 8, "sink_tokens": 2}
METHODS = [
    OPTIONS | {"method": "specattn"},
    OPTIONS | {"method": "sts", "rule": "top_k", "ratio": 0.1},
    {"method": "sketch", "ratio": 0.1, "min_tokens": 16, "recent_tokens": 8},
]


@pytest.fixture
def plainly(monkeypatch):
    """What each observed pair should give: samples {layer: [s of each query head, ...]}, from whole softmaxes."""
    from specattn_vllm.backend.impl import SpecAttnImpl
    from specattn_vllm.selection.audit import LayerAudit
    from specattn_vllm.selection.pages import page_strides

    samples: dict[str, list[float]] = {}
    observe, read, tables = LayerAudit.observe, SpecAttnImpl._read, []

    def watch_read(self, query, kv_cache, md, step, page_table, kept, out, *more):
        tables[:] = [page_table, kept]
        read(self, query, kv_cache, md, step, page_table, kept, out, *more)

    def watch(self, query, kv_cache, md, rows, scale, lse, soft_cap):
        observe(self, query, kv_cache, md, rows, scale, lse, soft_cap)
        name, (page_table, kept) = self._audit.layers[self._index], tables
        block_stride, head_stride, token_stride = page_strides(kv_cache)
        size = query.shape[-1]
        for r, row in enumerate(self._audit.scored_rows[self._index, :rows, 0].tolist()):
            if row < 0:
                continue
            seen = int(md.seq_lens[r]) - int(md.query_start_loc[r + 1] - md.query_start_loc[r]) + 1
            positions = torch.arange(seen)
            blocks = md.block_table[r, positions // kv_cache.shape[2]].long()
            offsets = positions % kv_cache.shape[2]
            for hq in range(query.shape[1]):
                head = hq // (query.shape[1] // kv_cache.shape[1])
                weights = (scale * kv_cache[blocks, head, offsets, :size] @ query[row, hq]).softmax(0)
                group = head if page_table.shape[1] > 1 else 0
                listed = page_table[r, group, : int(kept[r, group])]
                places = blocks * block_stride + group * head_stride + offsets * token_stride
                samples.setdefault(name, []).append(float(weights[torch.isin(places, listed.long())].sum()))

    monkeypatch.setattr(LayerAudit, "observe", watch)
    monkeypatch.setattr(SpecAttnImpl, "_read", watch_read)
    return samples


@pytest.mark.parametrize("method", METHODS, ids=lambda options: options["method"])
def test_every_pair_is_measured_as_it_is(method, engine, greedy, prompts, counts, plainly):
    llm = engine(method | {"audit_share": 1.0})
    greedy(llm, prompts([200, 420]), 20)
    seen = counts(llm)  # asked first: the last step is in them all the same
    [report] = llm.collective_rpc("specattn_audit")
    assert sorted(report) == sorted(plainly)
    # All layers that read a selection, in every row that did.
    assert seen.sparse_rows > 4 and seen.audited_pairs == seen.sparse_rows * len(report)
    for layer, found in report.items():
        mass = torch.tensor(plainly[layer])
        assert found["pairs"] == seen.sparse_rows
        assert found["retained_mean"] == pytest.approx(float(mass.mean()), abs=1e-4)
        # Quantiles are edges of bins, of which the widest has 0.031.
        for name, q in (("retained_p1", 0.01), ("retained_p10", 0.1), ("retained_p50", 0.5)):
            wanted = float(mass.sort().values[max(int(-(-q * len(mass) // 1)) - 1, 0)])
            assert found[name] <= wanted + 1e-4 and wanted - found[name] < 0.032
        assert 0 < found["bound_mean"] <= found["bound_max"]
    # A selection of this size leaves something out.
    assert min(found["retained_mean"] for found in report.values()) < 0.99


@pytest.mark.parametrize("method", METHODS, ids=lambda options: options["method"])
def test_without_a_share_nothing_is_measured(method, engine, greedy, prompts, counts, monkeypatch):
    from specattn_vllm.backend.impl import SpecAttnImpl

    impls, forward = [], SpecAttnImpl.forward
    monkeypatch.setattr(SpecAttnImpl, "forward", lambda self, *a, **k: (impls.append(self), forward(self, *a, **k))[1])
    llm = engine(method)
    greedy(llm, prompts([200]), 6)
    assert counts(llm).sparse_rows > 0 and counts(llm).audited_pairs == 0
    assert impls and all(impl.audit is None for impl in impls)
    assert llm.collective_rpc("specattn_audit") == [None]


def test_rows_that_read_everything_are_not_audited(engine, prompts, counts):
    """Of a target that drafts for nobody: exact requests, short contexts, and what vLLM runs to warm up."""
    from vllm import SamplingParams

    llm = engine({"method": "sketch", "ratio": 0.1, "min_tokens": 100, "audit_share": 1.0}, speculative_config=None)
    extra = ({"specattn": "exact"}, None, None)
    wanted = [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, extra_args=more) for more in extra]
    llm.generate(prompts([400, 60, 500]), wanted, use_tqdm=False)
    [report] = llm.collective_rpc("specattn_audit")
    seen = counts(llm)
    assert (seen.verify_rows, seen.sparse_rows, seen.exact_rows) == (15, 5, 5)
    assert {found["pairs"] for found in report.values()} == {5}

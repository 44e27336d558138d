"""The target's own queries choose what they read, over a small copy of its keys (docs/sketch.md)."""

from specattn_vllm.methods.base import BUDGET, Method

METHOD = Method(
    name="sketch",
    summary="the target's own queries choose what they read, over a small copy of its keys (approximate)",
    drafter="any",
    target_reads="own choice",
    options=BUDGET | {"sketch_bits", "shared_budget", "sparse_draft"},
    draft_options=frozenset({"draft_ratio"}),
    per_head=True,
    ratio=0.125,
    sparse_draft=True,
    keeps_sketch=True,
    # H200, Llama-8B shape, bf16, 2026-11-28 (docs/results/h200-sketch-engine.json): 16 requests of 4k, 65,536 tokens,
    # take 6.58 ms instead of 7.00 without speculation; shorter batches were not measured with a search.
    crossover={"fa3": 65536},
    paper="it is this package's own",
    attach="specattn_vllm.sketch.attach.attach",
)

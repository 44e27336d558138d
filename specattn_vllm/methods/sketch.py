"""The target's own queries choose what they read, over a small copy of its keys (docs/sketch.md)."""

from typing import Literal

from specattn_vllm.methods.base import Method
from specattn_vllm.methods.budget import BY_OWN_QUERIES, SketchedDraftOptions, ratio_field, sparse_draft_field
from specattn_vllm.options import for_researchers


class SketchOptions(SketchedDraftOptions):
    """What is read of the context, and how small the copy is."""

    ratio: float = ratio_field(0.125)
    sparse_draft: bool = sparse_draft_field(True, BY_OWN_QUERIES)
    shared_budget: Literal["layers", "heads", "none"] = for_researchers(
        "layers",
        description="With a fixed share, who shares what is read, so that `ratio` is the mean: the KV heads of all "
        "'layers', by a threshold that a request's last choosing step would have needed; the 'heads' of each layer; or "
        "'none', each reads as much.",
    )


METHOD = Method(
    name="sketch",
    summary="the target's own queries choose what they read, over a small copy of its keys (approximate)",
    drafter="any",
    target_reads="own choice",
    options=SketchOptions,
    per_head=True,
    keeps_sketch=True,
    # H200, Llama-8B shape, bf16, 2026-11-28 (docs/results/h200-sketch-alone.json): 16 requests of 4k, 65,536 tokens,
    # take 6.75 ms instead of 7.01 without speculation; shorter batches were not measured with a search.
    crossover={"fa3": 65536},
    paper="it is this package's own",
    attach="specattn_vllm.sketch.attach.attach",
)

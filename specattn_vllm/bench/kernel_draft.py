"""Drafting: attention that also hands out its scores, and the mass made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from specattn_vllm.bench import kernel_shapes as shapes
from specattn_vllm.bench.kernel_bench import Bench, Calls, relative_error
from specattn_vllm.bench.kernel_data import Requests, layer_count, random_positions, requests
from specattn_vllm.bench.kernel_report import Row
from specattn_vllm.bench.kernel_shapes import FIRST_STEP_LEN, VERIFY_LEN, Batch, Heads, Pair
from specattn_vllm.bench.kernel_verify import fa3_dense

CAPTURE_RATIO = 1.10  # time with capture over time without
INDEXED_KEPT = 0.1
SCORES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Step(NamedTuple):
    """One draft step of a batch, with everything `draft_attention` takes."""

    heads: Heads
    batch: Batch
    q_len: int
    req: Requests
    scored_rows: torch.Tensor
    lse: torch.Tensor

    @property
    def scale(self) -> float:
        return self.heads.size**-0.5

    def calls(
        self, draft: Callable[..., None], layers: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], **more: Any
    ) -> list[Callable[[], None]]:
        """Calls over layers; scores [R, C * Hq, L], taken in turns, or none."""
        req = self.req
        if scores:
            more |= {"scored_rows": self.scored_rows, "lse": self.lse}
        return [
            partial(
                draft, req.query, layer, req.block_table, req.seq_lens, req.query_start_loc, self.scale, req.out,
                max_query_len=self.q_len, **more, **({"scores": scores[i % len(scores)]} if scores else {}),
            )
            for i, layer in enumerate(layers)
        ]  # fmt: skip


def make_step(bench: Bench, heads: Heads, batch: Batch, q_len: int, scored: Sequence[int] = (-1,)) -> Step:
    """`scored`: the tokens of a request whose scores are handed out, counted from its end."""
    req = requests(heads, batch, q_len, bench.device, bench.dtype)
    # The sampled row is the last one of a request here; the kernel must not count on that.
    ends = torch.arange(1, batch.rows + 1, device=bench.device) * q_len
    rows = ends[:, None] + torch.tensor(scored, device=bench.device)
    lse = torch.empty(batch.rows, len(scored) * heads.query, device=bench.device)
    return Step(heads, batch, q_len, req, rows, lse)


def score_buffers(
    bench: Bench, heads: Heads, batch: Batch, dtype: torch.dtype, rotate: bool = False, scored: int = 1
) -> list[torch.Tensor]:
    """[R, scored * Hq, L] buffers: one, as in production, or enough to exceed L2."""
    shape = (batch.rows, scored * heads.query, batch.context)
    nbytes = batch.rows * scored * heads.query * batch.context * dtype.itemsize
    count = layer_count(nbytes, wanted=4 * max(bench.clock.l2, 1)) if rotate else 1
    return [torch.empty(shape, dtype=dtype, device=bench.device).normal_() for _ in range(count)]


def draft(bench: Bench, batch: Batch, pair: Pair, full: bool) -> None:
    heads = pair.draft
    layers = bench.arena.layers(heads, batch)
    kinds = ("fp32", "bf16") if full else ("fp32",)
    for q_len in (FIRST_STEP_LEN, 1):
        step = make_step(bench, heads, batch, q_len)
        shape = f"{batch} {heads} q{q_len}"
        dense = fa3_dense(bench, "draft", batch, heads, step.req, layers, q_len)
        nbytes = shapes.dense_bytes(heads, batch, q_len, bench.element)
        plain = bench.measure(
            "draft", "draft_attention", shape, partial(_plain, bench, step, layers), nbytes, dense,
            check=partial(_check, bench, step, layers), q_len=q_len,
        )  # fmt: skip
        for kind in kinds:
            scores = score_buffers(bench, heads, batch, SCORES[kind])
            more = shapes.score_bytes(heads, batch.rows, batch.context, SCORES[kind].itemsize)
            row = bench.measure(
                "draft", f"draft_attention + {kind} scores", shape,
                lambda step=step, scores=scores: step.calls(bench.operation("draft_attention"), layers, scores),
                nbytes + more, plain, {"time_ratio": CAPTURE_RATIO}, q_len=q_len, scores=kind,
            )  # fmt: skip
            _with_mass(bench, step, layers, scores, kind, nbytes + more, row)
            del scores
    if full:
        _indexed(bench, heads, batch, layers, plain)
        _two_rows(bench, pair.target, batch)
    for kind in kinds:
        _mass(bench, heads, batch, kind, full)


def _plain(bench: Bench, step: Step, layers: Sequence[torch.Tensor]) -> Calls:
    return step.calls(bench.operation("draft_attention"), layers, [])


def _check(bench: Bench, step: Step, layers: Sequence[torch.Tensor]) -> float:
    """The first request of the first layer against the reference."""
    from specattn_vllm.kernels import reference

    req, n = step.req, step.q_len
    req.out.fill_(torch.nan)
    step.calls(bench.operation("draft_attention"), layers[:1], [])[0]()
    wanted = torch.empty_like(req.out[:n])
    reference.draft_attention(
        req.query[:n], layers[0], req.block_table[:1], req.seq_lens[:1], req.query_start_loc[:2], step.scale, wanted,
        max_query_len=n,
    )  # fmt: skip
    return relative_error(req.out[:n], wanted)


def _with_mass(bench, step, layers, scores, kind, nbytes, alone: Row) -> None:
    """What a captured layer costs in production: attention, then mass from scores that are still in L2 if they fit."""
    heads, batch = step.heads, step.batch
    mass = torch.zeros(batch.rows, 1, batch.context, device=bench.device)
    lens = step.req.seq_lens - step.q_len

    def make() -> Calls:
        accumulate = bench.operation("accumulate_mass")

        def both(attend: Callable[[], None]) -> None:
            attend()
            accumulate(scores[0], step.lse, lens, mass, 1 / heads.query, "store")

        return [partial(both, call) for call in step.calls(bench.operation("draft_attention"), layers, scores)]

    more = shapes.mass_bytes(heads, batch.rows, batch.context, scores[0].element_size(), 1, "store")
    bench.measure(
        "draft", f"draft_attention + {kind} scores + mass", alone.shape, make, nbytes + more, alone, scores=kind
    )


def _two_rows(bench: Bench, heads: Heads, batch: Batch) -> None:
    """A verification of self-speculation: the scores of its first and its last row, against the same pass without."""
    layers = bench.arena.layers(heads, batch)
    step = make_step(bench, heads, batch, VERIFY_LEN, scored=(-VERIFY_LEN, -1))
    shape = f"{batch} {heads} q{VERIFY_LEN}"
    dense = fa3_dense(bench, "draft", batch, heads, step.req, layers, VERIFY_LEN)
    nbytes = shapes.dense_bytes(heads, batch, VERIFY_LEN, bench.element)
    plain = bench.measure(
        "draft", "draft_attention", shape, partial(_plain, bench, step, layers), nbytes, dense,
        check=partial(_check, bench, step, layers), q_len=VERIFY_LEN,
    )  # fmt: skip
    scores = score_buffers(bench, heads, batch, SCORES["bf16"], scored=2)
    nbytes += shapes.score_bytes(heads, 2 * batch.rows, batch.context, 2)
    bench.measure(
        "draft", "draft_attention + bf16 scores of two rows", shape,
        lambda: step.calls(bench.operation("draft_attention"), layers, scores), nbytes, plain,
        {"time_ratio": CAPTURE_RATIO}, q_len=VERIFY_LEN, scores="bf16", scored_rows=2,
    )  # fmt: skip


def _indexed(bench: Bench, heads: Heads, batch: Batch, layers: Sequence[torch.Tensor], plain: Row) -> None:
    step = make_step(bench, heads, batch, 1)
    # New tokens lie past the prefix, so they are not among the positions.
    entries = shapes.kept_tokens(batch.context, INDEXED_KEPT)
    kept = entries - FIRST_STEP_LEN
    positions = random_positions(batch, 1, entries, bench.device)[:, 0, :kept].int().contiguous()
    index = {
        "positions": positions,
        "kept": torch.full((batch.rows,), kept, dtype=torch.int32, device=bench.device),
        "prefix_lens": step.req.seq_lens - FIRST_STEP_LEN,
    }
    nbytes = shapes.sparse_bytes(heads, batch, 1, bench.element, entries, 1)
    shape = f"{batch} {heads} q1"
    for kind in (None, "fp32"):
        scores = score_buffers(bench, heads, batch, SCORES[kind]) if kind else []
        more = shapes.score_bytes(heads, batch.rows, entries, 4) if kind else 0
        bench.measure(
            "draft", f"draft_attention, {INDEXED_KEPT:.0%} by index{f' + {kind} scores' if kind else ''}", shape,
            lambda scores=scores: step.calls(bench.operation("draft_attention"), layers, scores, **index),
            nbytes + more, plain, q_len=1, kept=INDEXED_KEPT, kept_tokens=entries, scores=kind,
        )  # fmt: skip
    mass = torch.zeros(batch.rows, 1, batch.context, device=bench.device)
    step.lse.fill_(12.0)

    def make() -> Calls:
        accumulate = bench.operation("accumulate_mass")
        buffers = score_buffers(bench, heads, batch, torch.float32, rotate=True)
        lens, weight = index["prefix_lens"], 1 / heads.query
        return [
            partial(accumulate, part, step.lse, lens, mass, weight, "add", positions=positions, kept=index["kept"])
            for part in buffers
        ]

    bench.measure(
        "draft", f"accumulate_mass add, fp32, {INDEXED_KEPT:.0%} by index", f"{batch} {heads}", make,
        shapes.mass_bytes(heads, batch.rows, kept, 4, 1, "add") + batch.rows * kept * shapes.ID_BYTES,
        scores="fp32", groups=1, kept=INDEXED_KEPT,
    )  # fmt: skip


def _mass(bench: Bench, heads: Heads, batch: Batch, kind: str, full: bool) -> None:
    scores = score_buffers(bench, heads, batch, SCORES[kind], rotate=True)
    lse = torch.full((batch.rows, heads.query), 12.0, device=bench.device)
    lens = torch.full((batch.rows,), batch.context - VERIFY_LEN, dtype=torch.int32, device=bench.device)
    for groups in (1, heads.kv) if full and kind == "fp32" else (1,):
        mass = torch.zeros(batch.rows, groups, batch.context, device=bench.device)
        for combine in ("store", "add") if groups == 1 else ("add",):

            def make(mass=mass, combine=combine) -> Calls:
                accumulate = bench.operation("accumulate_mass")
                weight = mass.shape[1] / heads.query
                return [partial(accumulate, part, lse, lens, mass, weight, combine) for part in scores]

            bench.measure(
                "draft", f"accumulate_mass {combine}, {kind}{', per head' if groups > 1 else ''}", f"{batch} {heads}",
                make, shapes.mass_bytes(heads, batch.rows, batch.context, SCORES[kind].itemsize, groups, combine),
                scores=kind, groups=groups,
            )  # fmt: skip

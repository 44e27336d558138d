"""Selection and pruning: mass to bits, bits to page tables and positions, and what they cost in a round."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from specattn_vllm.bench import kernel_shapes as shapes
from specattn_vllm.bench.kernel_bench import Bench, Calls, Skip
from specattn_vllm.bench.kernel_data import layer_count, pack_bits, random_positions, realistic_mass
from specattn_vllm.bench.kernel_followers import followers
from specattn_vllm.bench.kernel_report import Row
from specattn_vllm.bench.kernel_shapes import BLOCK_SIZE, VERIFY_LEN, Batch, Pair

TOP_P, CAP = 0.9, 0.1
SORT_TARGET, TOPK_TARGET = 20.0, 5.0
SINK, RECENT = 4, 64
WIDE = 1.0  # width of the page tables, in contexts


def select(bench: Bench, batch: Batch, pair: Pair, full: bool) -> dict[int, Row]:
    """Rows of mass: one per source layer and request, and (full) per head. Returns the capped selection by groups."""
    return {groups: _select(bench, batch, pair, groups, full) for groups in ((1, pair.target.kv) if full else (1,))}


def _select(bench: Bench, batch: Batch, pair: Pair, groups: int, full: bool) -> Row:
    rows, context = pair.sources * batch.rows * groups, batch.context
    k = shapes.kept_tokens(context, CAP)
    first = realistic_mass(rows, context, bench.device)
    copies = layer_count(first.nbytes, limit=8, wanted=4 * max(bench.clock.l2, 1))
    masses = [first] + [first.clone() for _ in range(copies - 1)]
    lens = torch.full((rows,), context - VERIFY_LEN, dtype=torch.int32, device=bench.device)
    bits = torch.zeros(rows, shapes.words(context), dtype=torch.int32, device=bench.device)
    counts = torch.zeros(rows, dtype=torch.int32, device=bench.device)
    shape = f"{batch} {rows} rows"

    def torch_row(name: str, function: Callable[[torch.Tensor], object], nbytes: int) -> Row:
        return bench.measure("select", name, shape, lambda: [partial(function, mass) for mass in masses], nbytes)

    def ours(top_p: float, cap: float) -> Calls:
        operation = bench.operation("select_top_p")
        return [partial(operation, mass, lens, bits, counts, top_p, 0, -1, cap, SINK, RECENT) for mass in masses]

    sort = torch_row("torch.sort", partial(torch.sort, dim=-1, descending=True), shapes.sort_bytes(rows, context))
    topk = torch_row(f"torch.topk {CAP:.0%}", partial(torch.topk, k=k, dim=-1), shapes.topk_bytes(rows, context, k))
    nbytes = shapes.select_bytes(rows, context)
    result = None
    for name, top_p, cap in ((f"top_p {TOP_P:g}", TOP_P, 1.0), (f"cap {CAP:.0%}", 1.0, CAP)):
        for against, bound in ((sort, SORT_TARGET), (topk, TOPK_TARGET)):
            if result is not None and result.case == f"select_top_p, {name}":
                result = _also(bench, result, against, bound)
                continue
            result = bench.measure(
                "select", f"select_top_p, {name}", shape, partial(ours, top_p, cap), nbytes, against,
                {"speedup": bound}, top_p=top_p, max_fraction=cap, rows=rows, groups=groups,
            )  # fmt: skip
        if bench.rows[-1].ms is not None:
            # How much was chosen, without which a time says little.
            bench.rows[-1].add_note(f"chose {float(counts.float().mean()) / context:.1%}")
    if full:
        followers(bench, batch, groups)
    if full and groups == 1:
        _vllm_top_p(bench, masses, shape, nbytes, topk)
        _flashinfer(bench, masses, shape, nbytes, topk)
    return result


def _also(bench: Bench, row: Row, against: Row, bound: float) -> Row:
    """The same time compared with another row."""
    copy = Row(row.group, row.case, row.shape, row.parameters, row.ms, row.ms_p10, row.ms_p90, row.samples, row.calls,
               row.timing, row.bytes, row.gb_per_s, row.share_of_copy, row.bound_ms, note=row.note, error=row.error,
               skipped=row.skipped)  # fmt: skip
    copy.compare(against, {"speedup": bound} if bench.cuda else None)
    bench.rows.append(copy)
    return copy


def _vllm_top_p(bench: Bench, masses: list[torch.Tensor], shape: str, nbytes: int, against: Row) -> None:
    """vLLM's sampler works on logits and in place, so each call begins with fresh ones."""

    def make() -> Calls:
        if not bench.cuda:
            raise Skip("vLLM's top-p in Triton needs CUDA")
        try:
            from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton
        except ImportError as error:
            raise Skip(f"vLLM's top-p in Triton: {error}") from error
        p = torch.full((masses[0].shape[0],), TOP_P, device=bench.device)
        work = torch.empty_like(masses[0])

        def one(logits: torch.Tensor) -> None:
            work.copy_(logits)
            apply_top_k_top_p_triton(work, None, p)

        return [partial(one, mass.clamp(min=1e-30).log()) for mass in masses]

    row = bench.measure("select", f"vLLM's sampler, top_p {TOP_P:g}", shape, make, nbytes, against)
    row.add_note("with a copy of the logits, which it masks in place")


def _flashinfer(bench: Bench, masses: list[torch.Tensor], shape: str, nbytes: int, against: Row) -> None:
    def make() -> Calls:
        if not bench.cuda:
            raise Skip("FlashInfer needs CUDA")
        if importlib.util.find_spec("flashinfer") is None:
            raise Skip("flashinfer is not installed")
        if importlib.util.find_spec("flashinfer_jit_cache") is None:
            raise Skip("flashinfer-jit-cache is not installed: its kernels would first be compiled by nvcc")
        from flashinfer.sampling import top_p_renorm_probs

        return [partial(top_p_renorm_probs, mass, TOP_P) for mass in masses]

    bench.measure("select", f"flashinfer top_p {TOP_P:g}", shape, make, nbytes, against)


def prune(bench: Bench, batch: Batch, pair: Pair, full: bool) -> dict[int, list[Row]]:
    """Page tables of all sources, and positions. Returns the rows that a round pays, by score groups."""
    heads = pair.target
    kept_tokens = shapes.kept_tokens(batch.context, CAP)
    lens = torch.full((batch.rows,), batch.context, dtype=torch.int32, device=bench.device)
    blocks = torch.randperm(batch.rows * batch.blocks, device=bench.device).view(batch.rows, -1).int()
    slots = torch.randperm(batch.rows, device=bench.device)
    prefix = lens - VERIFY_LEN
    paid: dict[int, list[Row]] = {}
    for groups in (1, heads.kv) if full else (1,):
        positions = torch.stack(
            [random_positions(batch, groups, kept_tokens, bench.device) for _ in range(pair.sources)]
        )
        bits = pack_bits(positions, batch.context)  # [S, R, G, W]; by slot, where rows are slots
        del positions
        # (block, head, token) of a cache with tokens outermost.
        strides = (BLOCK_SIZE * heads.kv, 1, heads.kv)
        shape = f"{batch} {pair.sources} sources, {'per head' if groups > 1 else 'shared'}"

        def tables(groups=groups, bits=bits, strides=strides) -> Calls:
            build = bench.operation("build_page_tables")
            outer = (pair.sources, batch.rows, groups)
            table = torch.empty(*outer, int(batch.context * WIDE), dtype=torch.int32, device=bench.device)
            kept = torch.empty(outer, dtype=torch.int32, device=bench.device)
            return [partial(build, bits, slots, prefix, lens, blocks, BLOCK_SIZE, strides, table, kept)]

        nbytes = shapes.page_table_bytes(batch, pair.sources, groups, kept_tokens)
        paid[groups] = [bench.measure("prune", "build_page_tables", shape, tables, nbytes, kept=CAP, groups=groups)]
        if groups == 1:

            def lists(bits=bits) -> Calls:
                build = bench.operation("build_positions")
                outer = (pair.sources, batch.rows)
                out = torch.empty(*outer, batch.context, dtype=torch.int32, device=bench.device)
                kept = torch.empty(outer, dtype=torch.int32, device=bench.device)
                return [partial(build, bits, slots, lens, lens, out, kept)]

            nbytes = shapes.position_bytes(batch, pair.sources, kept_tokens)
            paid[1].append(bench.measure("prune", "build_positions", shape, lists, nbytes, kept=CAP, groups=1))
    return paid


def round_cost(bench: Bench, batch: Batch, selected: dict[int, Row], pruned: dict[int, list[Row]]) -> None:
    """Selection and pruning of one round, added up."""
    for groups in selected.keys() & pruned.keys():
        parts = [selected[groups], *pruned[groups]]
        shape = f"{batch} {'per head' if groups > 1 else 'shared'}"
        bench.add_up("prune", "selection + pruning of a round", shape, parts, groups=groups)

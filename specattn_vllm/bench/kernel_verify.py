"""Verification: FlashAttention 3 over everything against each executor over a selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from specattn_vllm.bench import kernel_shapes as shapes
from specattn_vllm.bench.kernel_bench import Bench, Calls, Skip, relative_error
from specattn_vllm.bench.kernel_data import Requests, pack_bits, page_table, random_positions, requests
from specattn_vllm.bench.kernel_report import Row, best
from specattn_vllm.bench.kernel_shapes import BLOCK_SIZE, VERIFY_LEN, Batch, Heads, Pair

# Splits that vLLM allows FA3 in a CUDA graph (flash_attn_max_num_splits_for_cuda_graph).
GRAPH_SPLITS = 32
TARGET_BATCH, TARGET_KEPT, TARGET_SPEEDUP = Batch(16, 32768), 0.1, 6.5


def fa3_dense(
    bench: Bench, group: str, batch: Batch, heads: Heads, req: Requests, layers: Sequence[torch.Tensor], q_len: int
) -> Row | None:
    """The baseline: everything read, with FA3's own schedule at each call and with vLLM's, made once for all layers.
    Returns the faster row."""
    scale = heads.size**-0.5

    def make(ahead: bool) -> Calls:
        if not bench.cuda:
            raise Skip("FlashAttention 3 needs CUDA")
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
        except ImportError as error:
            raise Skip(f"vLLM's FlashAttention: {error}") from error
        schedule = {}
        if ahead:
            metadata = get_scheduler_metadata(
                batch_size=batch.rows, max_seqlen_q=q_len, max_seqlen_k=batch.context, num_heads_q=heads.query,
                num_heads_kv=heads.kv, headdim=heads.size, cache_seqlens=req.seq_lens, qkv_dtype=bench.dtype,
                cu_seqlens_q=req.query_start_loc, page_size=BLOCK_SIZE, causal=True, num_splits=GRAPH_SPLITS,
            )  # fmt: skip
            schedule = {"scheduler_metadata": metadata, "num_splits": GRAPH_SPLITS}

        def one(layer: torch.Tensor) -> Callable[[], object]:
            k, v = layer.transpose(1, 2).split(heads.size, dim=-1)
            return partial(
                flash_attn_varlen_func, q=req.query, k=k, v=v, out=req.out, max_seqlen_q=q_len,
                cu_seqlens_q=req.query_start_loc, max_seqlen_k=batch.context, seqused_k=req.seq_lens,
                softmax_scale=scale, causal=True, block_table=req.block_table, fa_version=3, **schedule,
            )  # fmt: skip

        return [one(layer) for layer in layers]

    nbytes = shapes.dense_bytes(heads, batch, q_len, bench.element)
    shape = f"{batch} {heads} q{q_len}"
    rows = [
        bench.measure(group, "fa3 dense", shape, partial(make, False), nbytes, q_len=q_len),
        bench.measure(group, "fa3 dense, vLLM's schedule", shape, partial(make, True), nbytes, q_len=q_len),
    ]
    if not bench.cuda:
        rows.append(_reference_dense(bench, group, shape, req, layers, scale, nbytes))
    return best(rows)


def _reference_dense(bench, group, shape, req, layers, scale, nbytes) -> Row:
    def make() -> Calls:
        dense = bench.operation("dense_attention")
        return [
            partial(dense, req.query, layer, req.block_table, req.seq_lens, req.query_start_loc, scale, req.out)
            for layer in layers
        ]

    return bench.measure(group, "reference dense", shape, make, nbytes)


def verify(bench: Bench, batch: Batch, pair: Pair, fractions: Sequence[float], full: bool) -> None:
    """full: also wide tables, and executors that read whole blocks."""
    heads = pair.target
    layers = bench.arena.layers(heads, batch)
    req = requests(heads, batch, VERIFY_LEN, bench.device, bench.dtype)
    dense = fa3_dense(bench, "verify", batch, heads, req, layers, VERIFY_LEN)
    for fraction in fractions:
        for groups in (heads.kv, 1):
            positions = random_positions(batch, groups, shapes.kept_tokens(batch.context, fraction), bench.device)
            wide = full and fraction == min(fractions, key=lambda f: abs(f - TARGET_KEPT))
            for factor in (1.0, 2.5) if wide else (1.0,):
                for name in ("fa3", "triton"):
                    _sparse(bench, name, batch, heads, req, layers, positions, fraction, factor, dense)
        if full:
            _blocks(bench, batch, heads, req, layers, fraction, dense)


def _sparse(bench, name, batch, heads, req, layers, positions, fraction, factor, dense) -> Row:
    groups, kept = positions.shape[1:]
    scale = heads.size**-0.5
    calls: list[Callable[[], object]] = []

    def tables() -> tuple[torch.Tensor, torch.Tensor]:
        from specattn_vllm.selection.pages import page_strides

        table = page_table(positions, req.block_table, page_strides(layers[0]), int(batch.context * factor))
        return table, torch.full((batch.rows, groups), kept, dtype=torch.int32, device=bench.device)

    def make() -> Calls:
        sparse = bench.operation("sparse_attention")
        if name == "fa3":
            sparse = bench.executor(name).sparse_attention
        table, count = tables()
        calls.extend(
            partial(sparse, req.query, layer, table, count, req.query_start_loc, scale, req.out, VERIFY_LEN)
            for layer in layers
        )
        return calls

    def check() -> float:
        """The first request of the first layer against the reference."""
        from specattn_vllm.kernels import reference

        req.out.fill_(torch.nan)
        calls[0]()
        table, count = tables()
        wanted = torch.empty_like(req.out[:VERIFY_LEN])
        reference.sparse_attention(
            req.query[:VERIFY_LEN], layers[0], table[:1], count[:1], req.query_start_loc[:2], scale, wanted, VERIFY_LEN,
        )  # fmt: skip
        return relative_error(req.out[:VERIFY_LEN], wanted)

    exact = batch == TARGET_BATCH and fraction == TARGET_KEPT and factor == 1.0
    label = name if bench.cuda or name == "fa3" else "reference"
    return bench.measure(
        "verify",
        f"{label} {fraction:.0%}, {'per head' if groups > 1 else 'shared'}"
        f"{', wide table' if factor > 1 else ''}",
        f"{batch} {heads} q{VERIFY_LEN}",
        make,
        shapes.sparse_bytes(heads, batch, VERIFY_LEN, bench.element, kept, groups),
        dense,
        {"speedup": TARGET_SPEEDUP} if exact and name == "triton" else None,
        check,
        kept=fraction,
        kept_tokens=kept,
        groups=groups,
        table_width=int(batch.context * factor),
    )


def _blocks(bench, batch, heads, req, layers, fraction, dense) -> Row:
    """xformers reads whole blocks, so the selection is one of whole blocks too: what it would read of scattered tokens
    is a matter of quality, not of speed."""
    # Blocks of the context but the last two, which hold the new tokens and are always read.
    free = max((batch.context - 2 * BLOCK_SIZE) // BLOCK_SIZE, 1)
    count = max(round(free * fraction), 1)
    scale = heads.size**-0.5

    def make() -> Calls:
        module = bench.executor("xformers")
        from specattn_vllm.executors import resolve
        from specattn_vllm.selection.pages import page_strides

        build = resolve("xformers", bench.device, bench.dtype).build_page_tables
        picked = torch.rand(batch.rows, free, device=bench.device).topk(count, dim=-1).indices
        tokens = (picked[..., None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=bench.device)).flatten(1)
        bits = pack_bits(tokens, batch.context)[None, :, None]
        table = torch.zeros(1, batch.rows, 1, batch.blocks, dtype=torch.int32, device=bench.device)
        kept = torch.zeros(1, batch.rows, 1, dtype=torch.int32, device=bench.device)
        slots = torch.arange(batch.rows, device=bench.device)
        prefix = req.seq_lens - 2 * BLOCK_SIZE
        strides = page_strides(layers[0])
        build(bits, slots, prefix, req.seq_lens, req.block_table, BLOCK_SIZE, strides, table, kept)
        return [
            partial(
                module.sparse_attention, req.query, layer, table[0], kept[0], req.query_start_loc, scale, req.out,
                VERIFY_LEN,
            )
            for layer in layers
        ]  # fmt: skip

    tokens = min((count + 2) * BLOCK_SIZE, batch.context)
    return bench.measure(
        "verify",
        f"xformers {fraction:.0%}, blocks",
        f"{batch} {heads} q{VERIFY_LEN}",
        make,
        shapes.sparse_bytes(heads, batch, VERIFY_LEN, bench.element, tokens, 0)
        + batch.rows * (count + 2) * shapes.ID_BYTES,
        dense,
        kept=fraction,
        kept_tokens=tokens,
        groups=1,
    )

"""What is measured: `ROWS`, at the end. A row's function makes its inputs, and returns calls that do the same on
operands in turn, with the bytes that each must move: inputs read once, outputs written once, nothing for scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from specattn_vllm.bench.kernels.inputs import BLOCK_SIZE, VERIFY_LEN, Heads, Requests, Setup
from specattn_vllm.bench.kernels.sketch import Search
from specattn_vllm.kernels.sketch.contracts import BINS, CHUNK, MAX_SAMPLE

KEPT, TOP_P, SINK, RECENT = 0.1, 0.9, 4, 64
ID_BYTES = 4
HISTOGRAM_BYTES = BINS * 4


class Skip(Exception):
    """The row does not apply here; the message is the reason."""


class Case(NamedTuple):
    calls: Sequence[Callable[[], object]]
    nbytes: int


class Row(NamedTuple):
    name: str
    make: Callable[[Setup], Case]
    against: str | None = None
    """The row that it is compared with, which stands before it."""
    graph: bool = True
    """Timed by `do_bench_cudagraph`, as engines run it; else by `do_bench`."""


def dense(setup: Setup, of: str, q_len: int) -> Case:
    """Stock attention: FlashAttention 3 where the GPU has it."""
    heads = getattr(setup, of)
    req, attend = setup.requests(heads, q_len), setup.operations.dense_attention
    lengths = req.block_table, req.seq_lens, req.query_start_loc
    calls = [
        partial(attend, req.query, layer, *lengths, heads.size**-0.5, req.out, q_len, setup.context)
        for layer in setup.layers(heads)
    ]
    return Case(calls, dense_bytes(setup, heads, q_len))


def entry_bytes(setup: Setup, heads: Heads, entries: int, q_len: int) -> int:
    """Keys and values of `entries` tokens of each request and KV head, and queries and outputs of `q_len` rows."""
    return 2 * heads.size * setup.dtype.itemsize * setup.rows * (entries * heads.kv + q_len * heads.query)


def dense_bytes(setup: Setup, heads: Heads, q_len: int) -> int:
    return entry_bytes(setup, heads, setup.context, q_len) + setup.rows * setup.blocks * ID_BYTES


def sparse(setup: Setup, per_head: bool, by_fa3: bool) -> Case:
    """A verification over a selection, on the same pages for ours and for FlashAttention 3."""
    heads = setup.target
    groups, kept = heads.kv if per_head else 1, setup.kept_tokens(KEPT)
    attend = fa3(setup) if by_fa3 else setup.operations.sparse_attention
    layers, req = setup.layers(heads), setup.requests(heads, VERIFY_LEN)
    table = setup.page_table(setup.positions(groups, kept), req.block_table, layers[0])
    count = torch.full((setup.rows, groups), kept, dtype=torch.int32, device=setup.device)
    return over(setup, attend, layers, req, table, count, kept)


def over(setup: Setup, attend, layers, req: Requests, table: torch.Tensor, count: torch.Tensor, kept: int) -> Case:
    heads = setup.target
    calls = [
        partial(attend, req.query, layer, table, count, req.query_start_loc, heads.size**-0.5, req.out, VERIFY_LEN)
        for layer in layers
    ]
    return Case(calls, entry_bytes(setup, heads, kept, VERIFY_LEN) + count.numel() * (kept + 1) * ID_BYTES)


def fa3(setup: Setup) -> Callable[..., None]:
    from specattn_vllm.executors import fa3

    if reason := "FlashAttention 3 needs CUDA" if setup.device.type != "cuda" else fa3.unavailable():
        raise Skip(reason)
    return fa3.sparse_attention


def capture(setup: Setup, of: str, q_len: int, scored: int) -> Case:
    """Attention that leaves scores of each request's last row, or first and last, behind, in bf16."""
    heads, device = getattr(setup, of), setup.device
    req, more = setup.requests(heads, q_len), {}
    if scored:
        ends = torch.arange(1, setup.rows + 1, device=device)[:, None] * q_len
        lines = setup.rows, scored * heads.query
        more = {
            "scored_rows": ends + torch.tensor([-q_len, -1][2 - scored :], device=device),
            "scores": torch.empty(*lines, setup.context, dtype=torch.bfloat16, device=device),
            "lse": torch.empty(lines, device=device),
        }
    lengths = req.block_table, req.seq_lens, req.query_start_loc
    attend = partial(setup.operations.draft_attention, max_query_len=q_len, **more)
    calls = [partial(attend, req.query, layer, *lengths, heads.size**-0.5, req.out) for layer in setup.layers(heads)]
    score_bytes = setup.rows * scored * heads.query * (2 * setup.context + 4)
    return Case(calls, dense_bytes(setup, heads, q_len) + score_bytes)


def masses(setup: Setup) -> list[torch.Tensor]:
    """Rows of mass, one for each source layer and request."""
    first = setup.mass(setup.sources * setup.rows)
    return [first] + [first.clone() for _ in range(setup.turns(first.nbytes, 1 << 28) - 1)]


def sort(setup: Setup) -> Case:
    made = masses(setup)
    return Case([partial(torch.sort, each, dim=-1, descending=True) for each in made], made[0].numel() * (4 + 4 + 8))


def topk(setup: Setup) -> Case:
    made, k = masses(setup), setup.kept_tokens(KEPT)
    return Case([partial(torch.topk, each, k=k, dim=-1) for each in made], made[0].nbytes + len(made[0]) * k * 12)


def sampler(setup: Setup) -> Case:
    """vLLM's top-p in Triton, with a copy of the logits, which it masks in place."""
    if setup.device.type != "cuda":
        raise Skip("vLLM's top-p needs CUDA")
    from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

    made = [each.clamp(min=1e-30).log() for each in masses(setup)]
    p, work = torch.full((len(made[0]),), TOP_P, device=setup.device), torch.empty_like(made[0])
    calls = [lambda each=each: apply_top_k_top_p_triton(work.copy_(each), None, p) for each in made]
    return Case(calls, made[0].nbytes + work.nbytes)


def top_p(setup: Setup, share: float, capped: bool) -> Case:
    """Mass to one bit per token: the fewest that hold a share of it, or a fixed number of the heaviest."""
    made, device = masses(setup), setup.device
    rows, cap = len(made[0]), (setup.kept or KEPT) if capped else 1.0
    lens = torch.full((rows,), setup.context - VERIFY_LEN, dtype=torch.int32, device=device)
    bits = torch.zeros(rows, setup.words, dtype=torch.int32, device=device)
    counts, select = torch.zeros(rows, dtype=torch.int32, device=device), setup.operations.select_top_p
    calls = [partial(select, each, lens, bits, counts, share, 0, -1, cap, SINK, RECENT) for each in made]
    return Case(calls, made[0].nbytes + bits.nbytes + counts.nbytes)


def page_tables(setup: Setup, per_head: bool) -> Case:
    """Bits of all sources to page tables."""
    heads, device = setup.target, setup.device
    groups, kept = heads.kv if per_head else 1, setup.kept_tokens(KEPT)
    bits, req = setup.bits(groups, kept), setup.requests(heads, VERIFY_LEN)
    table = torch.empty(*bits.shape[:3], setup.context, dtype=torch.int32, device=device)
    count = torch.empty(bits.shape[:3], dtype=torch.int32, device=device)
    strides = (BLOCK_SIZE * heads.kv, 1, heads.kv)  # (block, head, token) of a cache with tokens outermost
    slots = torch.randperm(setup.rows, device=device)
    build = partial(setup.operations.build_page_tables, bits, slots, req.seq_lens - VERIFY_LEN, req.seq_lens)
    nbytes = bits.nbytes + req.block_table.nbytes + count.numel() * (kept + 1) * ID_BYTES
    return Case([partial(build, req.block_table, BLOCK_SIZE, strides, table, count)], nbytes)


def searching(setup: Setup, name: str) -> Case:
    """A layer of method `sketch`, kernel by kernel: of the scan, codes, scales and packed rows in, and a byte for each
    token out. Thresholds are carried over once a step."""
    it: Search = setup.once("search", lambda: Search(setup))
    heads, rows, tokens, token_bytes = it.heads, setup.rows, it.searched, it.layout.token_bytes
    if name == "attention":
        table, count = it.select(len(it.layers) - 1)
        return over(setup, setup.operations.sparse_attention, it.caches, it.req, table, count, it.kept)
    element, lists, chunks = setup.dtype.itemsize, rows * heads.kv, -(-tokens // CHUNK)
    packed, table = lists * it.sketch.packed.shape[2] * (heads.size + 3 * 4), rows * setup.blocks * ID_BYTES
    histograms = lists * (HISTOGRAM_BYTES + chunks * HISTOGRAM_BYTES // 2)
    sample = lists * (min(MAX_SAMPLE, tokens) * token_bytes + HISTOGRAM_BYTES)
    written = it.step.num_tokens * (heads.kv * (4 * heads.size * element + token_bytes) + 8)
    nbytes = {
        "encode": written + heads.size * heads.size * element,
        "prepare_queries": rows * VERIFY_LEN * heads.query * heads.size * element + sample + packed,
        "score_tokens": lists * tokens * (token_bytes + 1) + histograms + packed + table,
        "carry_thresholds": rows * (2 * (HISTOGRAM_BYTES + 8) + 8),
        "cut_scores": histograms + lists * 8 * (chunks + 1),
        "list_pages": lists * (tokens + (it.kept + 1) * ID_BYTES) + table,
    }
    return Case(it.encode_calls() if name == "encode" else it.calls_of(name), nbytes[name])


ROWS = [
    Row("dense", lambda s: dense(s, "target", VERIFY_LEN)),
    Row("sparse per-head", lambda s: sparse(s, True, False), "dense"),
    Row("sparse per-head fa3", lambda s: sparse(s, True, True), "dense"),
    Row("sparse shared", lambda s: sparse(s, False, False), "dense"),
    Row("sparse shared fa3", lambda s: sparse(s, False, True), "dense"),
    Row("verify scores", lambda s: capture(s, "target", VERIFY_LEN, 2), "dense"),
    Row("draft dense", lambda s: dense(s, "draft", 1)),
    Row("draft", lambda s: capture(s, "draft", 1, 0), "draft dense"),
    Row("draft scores", lambda s: capture(s, "draft", 1, 1), "draft"),
    Row("torch.sort", sort, graph=False),
    Row("torch.topk", topk, graph=False),
    Row("vllm top-p", sampler),
    Row("top-p", lambda s: top_p(s, TOP_P, False), "torch.sort"),
    Row("top-p capped", lambda s: top_p(s, 1.0, True), "torch.topk"),
    Row("page tables shared", lambda s: page_tables(s, False)),
    Row("page tables per-head", lambda s: page_tables(s, True)),
    Row("sketch encode", lambda s: searching(s, "encode")),
    Row("sketch queries", lambda s: searching(s, "prepare_queries")),
    Row("sketch scan", lambda s: searching(s, "score_tokens")),
    Row("sketch thresholds", lambda s: searching(s, "carry_thresholds")),
    Row("sketch cuts", lambda s: searching(s, "cut_scores")),
    Row("sketch pages", lambda s: searching(s, "list_pages")),
    Row("sketch attention", lambda s: searching(s, "attention"), "dense"),
]

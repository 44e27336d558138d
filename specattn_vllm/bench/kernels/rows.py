"""What is measured: `ROWS`, at the end. A row's function makes its inputs, and returns calls that do the same on
operands in turn, with the bytes that each must move: inputs read once, outputs written once, nothing for scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from specattn_vllm.bench.kernels.inputs import VERIFY_LEN, Heads, Requests, Setup
from specattn_vllm.bench.kernels.sketch import Search
from specattn_vllm.kernels.sketch.contracts import BINS, CHUNK, MAX_SAMPLE

KEPT = 0.1
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


def capture(setup: Setup, of: str, q_len: int) -> Case:
    """Attention that leaves scores of each request's last row, and of its first where there are several, behind, in
    bf16."""
    heads, device = getattr(setup, of), setup.device
    req, rows = setup.requests(heads, q_len), sorted({0, q_len - 1})
    scored = torch.arange(setup.rows, device=device)[:, None] * q_len + torch.tensor(rows, device=device)
    lines = setup.rows, len(rows) * heads.query
    more = {
        "scored_rows": scored,
        "scores": torch.empty(*lines, setup.context, dtype=torch.bfloat16, device=device),
        "lse": torch.empty(lines, device=device),
    }
    lengths = req.block_table, req.seq_lens, req.query_start_loc
    attend = partial(setup.operations.draft_attention, max_query_len=q_len, **more)
    calls = [partial(attend, req.query, layer, *lengths, heads.size**-0.5, req.out) for layer in setup.layers(heads)]
    return Case(calls, dense_bytes(setup, heads, q_len) + more["scores"].nbytes + more["lse"].nbytes)


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
    Row("verify scores", lambda s: capture(s, "target", VERIFY_LEN), "dense"),
    Row("draft dense", lambda s: dense(s, "draft", 1)),
    Row("draft scores", lambda s: capture(s, "draft", 1), "draft dense"),
    Row("sketch encode", lambda s: searching(s, "encode")),
    Row("sketch queries", lambda s: searching(s, "prepare_queries")),
    Row("sketch scan", lambda s: searching(s, "score_tokens")),
    Row("sketch thresholds", lambda s: searching(s, "carry_thresholds")),
    Row("sketch cuts", lambda s: searching(s, "cut_scores")),
    Row("sketch pages", lambda s: searching(s, "list_pages")),
    Row("sketch attention", lambda s: searching(s, "attention"), "dense"),
]

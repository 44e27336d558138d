"""What `specattn bench kernels` measures, as plain numbers: models, batches, and the bytes that an operation must move.

The bytes are a floor: every input read once, every output written once, nothing for what an implementation reads again
or keeps in scratch. So a share of the copy bandwidth says how far an implementation is from the best one, whichever
it is. No torch here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

BLOCK_SIZE = 16  # tokens of a block of vLLM's cache
DRAFT_TOKENS = 5  # K
VERIFY_LEN = DRAFT_TOKENS + 1
FIRST_STEP_LEN = DRAFT_TOKENS + 2  # the draft's first step also runs the tokens that verification accepted
MASS_BYTES, BITS_BYTES, ID_BYTES = 4, 4, 4
# Of a sketch's search (kernels/sketch/contracts.py, which loads torch).
SAMPLED_TOKENS, SCORED_CHUNK, HISTOGRAM_BYTES = 512, 2048, 256 * 4


class Heads(NamedTuple):
    """Attention of one layer: query heads, KV heads, head size."""

    query: int
    kv: int
    size: int

    def __str__(self) -> str:
        return f"{self.query}/{self.kv}h d{self.size}"


class Pair(NamedTuple):
    """A target and a draft; sources: draft layers whose attention is captured (all of them)."""

    name: str
    target: Heads
    draft: Heads
    sources: int


PAIRS = {
    "llama-8b-1b": Pair("llama-8b-1b", Heads(32, 8, 128), Heads(32, 8, 64), 16),
    "qwen3-8b-0.6b": Pair("qwen3-8b-0.6b", Heads(32, 8, 128), Heads(16, 8, 128), 28),
}
# What the CPU's references do in milliseconds.
TINY = Pair("tiny", Heads(4, 2, 64), Heads(4, 2, 64), 2)


class Batch(NamedTuple):
    """Requests, and the context of each in tokens, the new ones included."""

    rows: int
    context: int

    def __str__(self) -> str:
        k, rest = divmod(self.context, 1024)
        return f"{self.rows}x{self.context if rest else f'{k}k'}"

    @property
    def blocks(self) -> int:
        """Blocks of one request."""
        return -(-self.context // BLOCK_SIZE)


def parse_batch(text: str) -> Batch:
    """'16x32k' -> Batch(16, 32768)."""
    found = re.fullmatch(r"(\d+)x(\d+)(k?)", text.strip().lower())
    batch = Batch(int(found[1]), int(found[2]) * (1024 if found[3] else 1)) if found else Batch(0, 0)
    if batch.rows < 1 or batch.context < 2 * FIRST_STEP_LEN:
        raise ValueError(f"got {text!r}, wanted requests x context such as 16x32k (at least 1x{2 * FIRST_STEP_LEN})")
    return batch


def kept_tokens(context: int, fraction: float) -> int:
    """Entries of a page table that holds a fraction of the context; the new tokens are always among them."""
    return min(context, max(round(context * fraction), FIRST_STEP_LEN + 1))


def words(context: int) -> int:
    return -(-context // 32)


def query_bytes(heads: Heads, tokens: int, element: int) -> int:
    """Queries in, outputs out."""
    return 2 * tokens * heads.query * heads.size * element


def kv_bytes(heads: Heads, entries: int, element: int) -> int:
    """Key and value of `entries` tokens, in every KV head."""
    return entries * heads.kv * 2 * heads.size * element


def dense_bytes(heads: Heads, batch: Batch, q_len: int, element: int) -> int:
    table = batch.rows * batch.blocks * ID_BYTES
    everything = kv_bytes(heads, batch.rows * batch.context, element)
    return everything + query_bytes(heads, batch.rows * q_len, element) + table


def sparse_bytes(heads: Heads, batch: Batch, q_len: int, element: int, kept: int, groups: int) -> int:
    table = batch.rows * groups * (kept + 1) * ID_BYTES
    entries = kv_bytes(heads, batch.rows * kept, element)
    return entries + query_bytes(heads, batch.rows * q_len, element) + table


def score_bytes(heads: Heads, rows: int, columns: int, element: int) -> int:
    """Scaled logits of one query row per request, and their logsumexp."""
    return rows * heads.query * (columns * element + 4)


def mass_bytes(heads: Heads, rows: int, columns: int, element: int, groups: int, combine: str) -> int:
    passes = 1 if combine == "store" else 2
    return score_bytes(heads, rows, columns, element) + passes * rows * groups * columns * MASS_BYTES


def select_bytes(rows: int, context: int) -> int:
    return rows * (context * MASS_BYTES + words(context) * BITS_BYTES + 4)


def sort_bytes(rows: int, context: int) -> int:
    """torch.sort: values in; values and int64 indices out."""
    return rows * context * (4 + 4 + 8)


def topk_bytes(rows: int, context: int, k: int) -> int:
    return rows * (context * 4 + k * (4 + 8))


def page_table_bytes(batch: Batch, sources: int, groups: int, kept: int) -> int:
    bits = sources * batch.rows * groups * words(batch.context) * BITS_BYTES
    blocks = batch.rows * batch.blocks * ID_BYTES
    return bits + blocks + sources * batch.rows * groups * (kept + 1) * ID_BYTES


def position_bytes(batch: Batch, sources: int, kept: int) -> int:
    return sources * batch.rows * (words(batch.context) * BITS_BYTES + (kept + 1) * ID_BYTES)


def encode_bytes(heads: Heads, tokens: int, element: int, token_bytes: int) -> int:
    """New keys and values in; the same out, with codes and scales, `token_bytes` for a token and KV head."""
    return tokens * (heads.kv * (4 * heads.size * element + token_bytes) + 8) + heads.size * heads.size * element


def packed_bytes(heads: Heads, batch: Batch, width: int) -> int:
    """Query rows in 8 bits and their three factors, `width` rows for each request and KV head."""
    return batch.rows * heads.kv * width * (heads.size + 3 * 4)


def prepare_bytes(heads: Heads, batch: Batch, element: int, token_bytes: int, width: int) -> int:
    """Queries and the sampled tokens' sketches in; packed rows and a zeroed histogram out."""
    queries = batch.rows * VERIFY_LEN * heads.query * heads.size * element
    sampled = batch.rows * heads.kv * min(SAMPLED_TOKENS, batch.context - VERIFY_LEN) * token_bytes
    return queries + sampled + packed_bytes(heads, batch, width) + batch.rows * heads.kv * HISTOGRAM_BYTES


def scan_bytes(heads: Heads, batch: Batch, token_bytes: int, width: int) -> int:
    """Codes, scales and packed rows in; a score of one byte for each token out, and the histograms."""
    context = batch.context - VERIFY_LEN
    tokens = batch.rows * heads.kv * context * (token_bytes + 1)
    chunks = -(-context // SCORED_CHUNK)
    histograms = batch.rows * heads.kv * (HISTOGRAM_BYTES + chunks * HISTOGRAM_BYTES // 2)
    return tokens + histograms + packed_bytes(heads, batch, width) + batch.rows * batch.blocks * ID_BYTES


def carry_bytes(batch: Batch) -> int:
    """What was counted of a request in and, as zeros, out; its threshold out."""
    return batch.rows * (2 * (HISTOGRAM_BYTES + 8) + 8)


def cut_bytes(heads: Heads, batch: Batch) -> int:
    """Histograms in; a cut for each head, and where each chunk begins, out."""
    chunks = -(-(batch.context - VERIFY_LEN) // SCORED_CHUNK)
    return batch.rows * heads.kv * (HISTOGRAM_BYTES + chunks * (HISTOGRAM_BYTES // 2 + 8) + 8)


def list_bytes(heads: Heads, batch: Batch, kept: int) -> int:
    """Scores in, page ids out."""
    per_head = batch.context - VERIFY_LEN + (kept + 1) * ID_BYTES
    return batch.rows * (heads.kv * per_head + batch.blocks * ID_BYTES)

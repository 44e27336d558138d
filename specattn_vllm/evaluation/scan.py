"""What is searched before anything is chosen: a copy or a summary of all keys, which is read as well. Loads no torch.

Shares are of the bytes of the entries that are searched, K and V of each token and KV head. A cache in 16 bits is
meant, or one of 8-bit floats, whatever a run computes in: evaluations on a CPU compute in 32 bits what is served in 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specattn_vllm.stats import Counts

ELEMENT_BYTES = 2


def of_sketch(bits: int, head_size: int, fp8: bool = False) -> float:
    """A code for each of a key's elements, and a scale in 16 bits. fp8: whether the cache has 8-bit floats."""
    return (bits * head_size / 8 + 2) / (2 * head_size * (1 if fp8 else ELEMENT_BYTES))


def byte_fraction(counts: Counts, share: float) -> float:
    """Bytes that verification read over those of all of its KV: the entries that it kept, and `share` of those that it
    searched, and of those that it sampled before."""
    if not counts.kv_scanned:
        return counts.kv_fraction
    return (counts.kv_read + share * (counts.kv_scanned + counts.kv_sampled)) / counts.kv_full

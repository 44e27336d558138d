"""Which code runs each operation on which device.

`torch` is the PyTorch reference, in production on CPU and the oracle of the tests; `triton` is the kernels, on CUDA or,
for tests, through Triton's interpreter. Both have the same signatures (`kernels/README.md`). An executor that is asked
for and cannot run is an error; only `auto` chooses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch


class ExecutorError(ValueError):
    """The executor asked for does not run here; the message has the remedy."""


@dataclass(frozen=True)
class Operations:
    """The operations of one executor; signatures are those of `specattn_vllm.kernels`."""

    name: str
    decode_attention: Callable[..., None]
    accumulate_mass: Callable[..., None]
    select_top_p: Callable[..., None]
    build_page_tables: Callable[..., None]
    sparse_attention: Callable[..., None]
    dense_attention: Callable[..., None]
    write_kv: Callable[..., None]


def resolve(name: str, device: torch.device) -> Operations:
    """The operations for an executor name ('auto', 'torch', 'triton') on a device."""
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch"
    if name == "torch":
        if device.type != "cpu":
            raise ExecutorError(f"executor = 'torch' runs on CPU, not on {device.type}: use 'auto' or 'triton'")
        return _torch_operations()
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ExecutorError(
            f"executor = 'triton' on {device.type} needs Triton's interpreter (TRITON_INTERPRET=1): use 'auto' or "
            "'torch'"
        )
    return _triton_operations(device)


def _torch_operations() -> Operations:
    from specattn_vllm.kernels import reference

    return Operations(
        name="torch",
        decode_attention=reference.decode_attention,
        accumulate_mass=reference.accumulate_mass,
        select_top_p=reference.select_top_p,
        build_page_tables=reference.build_page_tables,
        sparse_attention=reference.sparse_attention,
        dense_attention=_dense_attention,
        write_kv=write_kv,
    )


def _triton_operations(device: torch.device) -> Operations:
    from specattn_vllm.kernels.accumulate_mass import accumulate_mass
    from specattn_vllm.kernels.decode_attention import decode_attention
    from specattn_vllm.kernels.page_tables import build_page_tables
    from specattn_vllm.kernels.sparse_attention import sparse_attention
    from specattn_vllm.kernels.top_p import select_top_p

    dense, write = _dense_attention, write_kv
    if device.type == "cuda":
        from specattn_vllm.compat import vllm_dense_attention, vllm_write_kv

        dense, write = vllm_dense_attention, vllm_write_kv
    return Operations(
        name="triton",
        decode_attention=decode_attention,
        accumulate_mass=accumulate_mass,
        select_top_p=select_top_p,
        build_page_tables=build_page_tables,
        sparse_attention=sparse_attention,
        dense_attention=dense,
        write_kv=write,
    )


def _dense_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
) -> None:
    """Causal attention over everything; the bounds serve CUDA kernels, which cannot read lengths on the host."""
    from specattn_vllm.kernels import reference

    reference.dense_attention(query, kv_cache, block_table, seq_lens, query_start_loc, scale, out)


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write new keys and values into the paged cache.

    key, value [T, H, D]; kv_cache [B, H, N, 2D]; slot_mapping [T] int64, block * N + offset, negative for padding.
    """
    tokens = slot_mapping.shape[0]
    rows = torch.cat((key[:tokens], value[:tokens]), dim=-1)
    if bool((slot_mapping < 0).any()):
        rows, slot_mapping = rows[slot_mapping >= 0], slot_mapping[slot_mapping >= 0]
    block_size = kv_cache.shape[2]
    kv_cache.transpose(1, 2)[slot_mapping // block_size, slot_mapping % block_size] = rows.to(kv_cache.dtype)

"""Chooses the code that runs each operation, by the device and the options.

`torch` is the PyTorch reference: it serves on CPUs, and the tests compare the kernels with it. `triton` is our kernels,
on CUDA, or through Triton's interpreter for tests. `fa3` and `xformers` take sparse attention from another library
(except that `auto` may keep our sparse kernel), and `fa3` dense attention too; the rest is that of `triton`. All have
the same signatures (`kernels/README.md`). A named executor that cannot run is an error; only `auto` chooses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch

from specattn_vllm.kernels.contracts import FP8

if TYPE_CHECKING:
    from specattn_vllm.options import SpecAttnOptions

CHOICES = ("auto", "torch", "triton", "fa3", "xformers")
BLOCKS = ("xformers",)
"""Executors of granularity 'block'."""
BLOCK_HEAD_SIZES = (64, 128)
"""Head sizes with which these were tested."""


class ExecutorError(ValueError):
    """The named executor does not run here. The message has the remedy."""


@dataclass(frozen=True)
class Operations:
    """The operations of one executor; signatures are those of `specattn_vllm.kernels`."""

    name: str
    draft_attention: Callable[..., None]
    accumulate_mass: Callable[..., None]
    dilate_mass: Callable[..., None]
    select_top_p: Callable[..., None]
    build_page_tables: Callable[..., None]
    sparse_attention: Callable[..., None]
    take_selections: Callable[..., None]
    count_reads: Callable[..., None]
    count_sampled: Callable[..., None]
    load_round: Callable[..., None]
    start_clock: Callable[..., None]
    stop_clock: Callable[..., None]
    mark_rows: Callable[..., None]
    encode_keys: Callable[..., None]
    prepare_queries: Callable[..., None]
    score_tokens: Callable[..., None]
    carry_thresholds: Callable[..., None]
    cut_scores: Callable[..., None]
    list_pages: Callable[..., None]
    sample_unread: Callable[..., None]
    bound_lost: Callable[..., None]
    dense_attention: Callable[..., None]
    write_kv: Callable[..., None]
    granularity: Literal["token", "block"] = "token"
    """The unit that `build_page_tables` lists. 'block': whole blocks of vLLM's cache, so no selections per head."""
    graphs: bool = False
    """Whether verification can be captured in a full CUDA graph."""
    label: str = ""
    """The name in the log, if it differs from `name`."""


def of_engine(options: SpecAttnOptions, device: torch.device, config: Any) -> Operations:
    """The operations of an engine with these options and vLLM's configuration."""
    fp8, dtype = cache_dtype(config) == FP8, config.model_config.dtype
    return resolve(options.executor, device, dtype, per_head=options.needs_token_pages, fp8=fp8)


def cache_dtype(config: Any) -> torch.dtype:
    """The dtype of the elements of an engine's KV cache; the start-up checks allow no others."""
    return FP8 if config.cache_config.cache_dtype.startswith("fp8") else config.model_config.dtype


def resolve(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    *,
    per_head: bool = False,
    fp8: bool = False,
) -> Operations:
    """The operations for an executor name (one of CHOICES) on a device, for models of this dtype. `per_head`: whether
    each KV head has a selection of its own. `fp8`: whether the cache's elements have 8 bits."""
    chooses = name == "auto"
    if chooses:
        name = _best(device, dtype)
    if name in BLOCKS and per_head:
        raise ExecutorError(
            f"executor = {name!r} reads whole blocks, which hold all KV heads, but methods 'sketch' and 'sts' "
            "choose for each head: use 'auto' or 'triton', or method='specattn'"
        )
    if name == "xformers" and fp8:
        raise ExecutorError("executor = 'xformers' does not read an fp8 KV cache: use 'auto' or 'triton'")
    if name == "torch":
        if device.type != "cpu":
            raise ExecutorError(f"executor = 'torch' runs on CPU, not on {device.type}: use 'auto' or 'triton'")
        return _torch_operations()
    if name in ("fa3", "xformers"):
        if reason := _unavailable(name, device, dtype):
            raise ExecutorError(f"executor = {name!r}: {reason}; or use 'auto' or 'triton'")
        return _borrowed_operations(name, device, own_sparse=name == "fa3" and (fp8 or (chooses and per_head)))
    if fp8 and device.type != "cuda":
        raise ExecutorError("executor = 'triton': its interpreter rounds 8-bit floats wrongly: use 'auto' or 'torch'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ExecutorError(
            f"executor = 'triton' on {device.type} needs Triton's interpreter (TRITON_INTERPRET=1): use 'auto' or "
            "'torch'"
        )
    return _triton_operations(device)


def _best(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return "torch"
    # Without FlashAttention 3, our kernels are faster: xformers reads whole blocks, and took four times as long for a
    # tenth of 16x32k on an H200 (docs/results/h200-kernels.json). Other GPUs were not measured.
    return "triton" if _unavailable("fa3", device, dtype) else "fa3"


def _unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an executor from another library does not run, with the remedy; None if it runs."""
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"runs models in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}: set --dtype"
    if name == "fa3":
        from specattn_vllm.executors import fa3 as module
    else:
        from specattn_vllm.executors import xformers as module
    return module.unavailable()


def _of(module: ModuleType, **more: Any) -> Operations:
    """Operations whose kernels, or their references, are in a module under their own names; `more` goes first."""
    ours = {field.name for field in fields(Operations)} & {*module.__all__}
    return Operations(**({name: getattr(module, name) for name in ours} | more))


def _torch_operations() -> Operations:
    from specattn_vllm.kernels import reference

    return _of(reference, name="torch", dense_attention=_dense_attention, write_kv=write_kv)


def _triton_operations(device: torch.device) -> Operations:
    from specattn_vllm.kernels import launchers

    dense, write = _dense_attention, write_kv
    if device.type == "cuda":
        from specattn_vllm.executors import stock

        dense, write = stock.dense_attention, stock.write_kv
    return _of(launchers, name="triton", dense_attention=dense, write_kv=write, graphs=device.type == "cuda")


def _borrowed_operations(name: str, device: torch.device, *, own_sparse: bool = False) -> Operations:
    """Attention of another library, and our kernels for the rest. `own_sparse`: our kernel for sparse attention too.
    'auto' uses it instead of FlashAttention 3's if each KV head has a selection: it takes 6 to 60% less time then, from
    1x32k to 64x4k and 4x128k with 5 to 25% kept (H200, head size 128, 2026-11-26, docs/results/h200-kernels.json). With
    one selection for all heads it takes 4 to 10% more, for four requests of 32k or more. All of this was measured with
    24 query rows per KV head; 48 query rows (8 query heads, 5 drafts) were not measured. With an fp8 cache it is always
    ours, which keeps the queries as they are."""
    base = _triton_operations(device)
    if name == "fa3":
        from specattn_vllm.executors import fa3

        sparse = base.sparse_attention if own_sparse else fa3.sparse_attention
        label = "fa3, and triton for selections" if own_sparse else ""
        return replace(
            base, name=name, label=label, sparse_attention=sparse, dense_attention=fa3.dense_attention, graphs=True
        )
    from specattn_vllm.executors import xformers
    from specattn_vllm.kernels.selection.block_tables import build_block_tables

    return replace(
        base,
        name=name,
        build_page_tables=build_block_tables,
        sparse_attention=xformers.sparse_attention,
        granularity="block",
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
    sinks: torch.Tensor | None = None,
    query_scale: float = 1.0,
    soft_cap: float | None = None,
) -> None:
    """Dense causal attention. The two bounds are for CUDA kernels, which cannot read lengths on the host. sinks [Hq]: a
    logit of each query head that is in the denominator of the softmax, and has no value. query_scale: that of executors
    which turn queries into 8-bit floats, as the cache's elements are. soft_cap: logits l become soft_cap *
    tanh(l / soft_cap)."""
    from specattn_vllm.kernels import reference

    reference.dense_attention(query, kv_cache, block_table, seq_lens, query_start_loc, scale, out, sinks, soft_cap)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Write new keys and values into the paged cache.

    key, value [T, H, D]; kv_cache [B, H, N, 2D]; slot_mapping [T] int64, block * N + offset, negative for padding. The
    scales are for a cache of 8-bit floats: what 1 in it is worth.
    """
    from specattn_vllm.kernels.fp8 import rounded

    tokens = slot_mapping.shape[0]
    key, value = key[:tokens], value[:tokens]
    if kv_cache.dtype == FP8:
        key, value = rounded(key, key_scale), rounded(value, value_scale)
    rows = torch.cat((key, value), dim=-1)
    if bool((slot_mapping < 0).any()):
        rows, slot_mapping = rows[slot_mapping >= 0], slot_mapping[slot_mapping >= 0]
    block_size = kv_cache.shape[2]
    kv_cache.transpose(1, 2)[slot_mapping // block_size, slot_mapping % block_size] = rows.to(kv_cache.dtype)

"""The class behind `--attention-backend specattn`: its capabilities and its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from specattn_vllm.kernels.contracts import HEAD_SIZES
from specattn_vllm.kernels.sketch.layout import SketchLayout


class SpecAttnBackend(AttentionBackend):
    """Paged attention whose verification rows read a selection of the cache.

    vLLM refuses every feature that is not declared here (MLA, sliding windows, context parallelism, ...) and names
    this backend, because the base class supports no feature by default.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "SPECATTN"

    @staticmethod
    def get_impl_cls():
        from specattn_vllm.backend.impl import SpecAttnImpl

        return SpecAttnImpl

    @staticmethod
    def get_builder_cls():
        from specattn_vllm.backend.builder import SpecAttnMetadataBuilder

        return SpecAttnMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [*HEAD_SIZES]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Both layouts keep key and value of one token and head together, as one page of the head-folded view. The
        # token-major one is preferred: all heads of a token are neighbours, so shared selections touch fewer cache
        # lines.
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Add room for the sketch of its keys to each page. vLLM counts this room as part of the cache, and a block is
        always found together with its sketch."""
        bits = cls.get_impl_cls().sketch_bits
        if not bits:
            return spec
        layout = SketchLayout(spec.num_kv_heads, spec.block_size, spec.head_size, bits, spec.dtype.itemsize)
        # For hybrid models vLLM asks for a page of one token, and makes blocks of as many as a state of another layer
        # is large. A whole row for one token's sketch would be counted for each of them.
        added = layout.used_bytes if spec.block_size == 1 else layout.tail_bytes
        return replace(spec, page_size_padded=spec.unpadded_page_size_bytes + added)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # which ones, the start-up checks know

"""Attention of one layer: sparse for verification rows, captured for draft rows, dense for the rest."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from specattn_vllm import executors
from specattn_vllm.backend.metadata import SpecAttnMetadata
from specattn_vllm.kernels.attention.sinks import weigh_against_sinks
from specattn_vllm.kernels.contracts import FP8
from specattn_vllm.kernels.fp8 import rounded
from specattn_vllm.options import SINKS, SOFT_CAP, SpecAttnOptions
from specattn_vllm.selection.own_choice import ChoiceBatch, NewEntries

if TYPE_CHECKING:
    from specattn_vllm.backend.target_choice import TargetChoice
    from specattn_vllm.selection.audit import LayerAudit
    from specattn_vllm.selection.own_choice import ChoiceStep, LayerChoice
    from specattn_vllm.selection.plan import SparsePlan


class SpecAttnImpl(AttentionImpl[SpecAttnMetadata]):
    """Runs the attention of one layer with the executor that the options name."""

    sketch_bits: ClassVar[int] = 0
    """Bits per element of the sketch after each block of the cache; 0: no sketch. It is a class attribute, which the
    layers set when they are made, because vLLM asks for the cache's shape without a configuration."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unsupported,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype  # read by the base class
        self.fp8 = kv_cache_dtype.startswith("fp8")
        self.key_scale = self.value_scale = self.query_scale = 1.0
        """What 1 in an fp8 cache is worth, and in queries that an executor rounds."""
        refused = {
            "ALiBi slopes": alibi_slopes,
            "a sliding window": sliding_window,
            "a KV cache shared between layers": kv_sharing_target_layer_name,
            "an attention type other than decoder": None if attn_type == AttentionType.DECODER else attn_type,
            **{name: value for name, value in unsupported.items()},
        }
        vllm_config = get_current_vllm_config()
        options = SpecAttnOptions.from_vllm(vllm_config)
        parts = {SINKS: sinks, SOFT_CAP: logits_soft_cap or None}
        refused |= {what: value for what, value in parts.items() if what in options.cannot_have}
        for what, value in refused.items():
            if value is not None:
                raise NotImplementedError(
                    f"--attention-backend specattn does not support models with {what} (got {value!r}) with method "
                    f"{options.method!r}; serve this model with vLLM's own backends"
                )
        self.sinks = sinks
        """[Hq], the logit of each head's sink: a token without a value, in the denominator of the softmax."""
        self.soft_cap = logits_soft_cap or None
        self.operations = executors.of_engine(options, torch.device(vllm_config.device_config.device), vllm_config)
        if self.operations.granularity == "block" and self.soft_cap is not None:
            raise executors.ExecutorError(
                f"executor = {self.operations.name!r} knows no soft cap on logits: use 'auto' or 'triton'"
            )
        if self.operations.granularity == "block" and head_size not in executors.BLOCK_HEAD_SIZES:
            raise executors.ExecutorError(
                f"executor = {self.operations.name!r} reads head sizes 64 and 128, not {head_size}: use 'auto' or "
                "'triton'"
            )
        self.audit: LayerAudit | None = None
        self.choice: LayerChoice | None = None
        self.target_choice: TargetChoice | None = None
        """The object to which the metadata builder of this layer announces each step."""
        SpecAttnImpl.sketch_bits = options.sketch_bits_in_cache

    def _as_fp8(self, layer, kv_cache: torch.Tensor) -> torch.Tensor:
        """vLLM's tensor of bytes as numbers. The layer has their scales, which are fixed when weights are loaded."""
        self.key_scale, self.value_scale = layer._k_scale_float, layer._v_scale_float
        self.query_scale = layer._q_scale_float
        return kv_cache.view(FP8)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        if self.fp8:
            kv_cache = self._as_fp8(layer, kv_cache)
        new = NewEntries(key, value, kv_cache, slot_mapping, self.key_scale, self.value_scale)
        if self.choice is None or not self.choice.write(new):
            self.operations.write_kv(*new)
        if self.audit is not None:
            if self.fp8:
                value = rounded(value, self.value_scale).float() * self.value_scale
            self.audit.note_values(value, slot_mapping)

    @property
    def keeps_beside(self) -> bool:
        """Whether anything is kept about the keys and values that are in the cache."""
        return self.choice is not None or self.audit is not None

    def note_filled(self, layer, slot_mapping: torch.Tensor) -> None:
        """Keys and values in slots of the layer's cache, slot_mapping [T] int64, none of them negative, may have come
        there without `do_kv_cache_update`. What is kept beside them is made anew."""
        raw = layer.kv_cache  # bytes, if the cache is fp8
        kv_cache = self._as_fp8(layer, raw) if self.fp8 else raw
        block, offset = slot_mapping // raw.shape[2], slot_mapping % raw.shape[2]
        if self.choice is not None:
            key = raw[block, :, offset, : self.head_size].view(kv_cache.dtype)
            self.choice.note_filled(key, kv_cache, slot_mapping)
        if self.audit is not None:
            value = raw[block, :, offset, self.head_size :].view(kv_cache.dtype)
            self.audit.note_values(value.float() * self.value_scale, slot_mapping)

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SpecAttnMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output [T, Hq, D]; kv_cache [B, H, N, 2D]. Rows of T past num_actual_tokens are padding."""
        if self.fp8:
            kv_cache = self._as_fp8(layer, kv_cache)
        if attn_metadata is None:
            # There is no cache yet: vLLM profiles memory, or we measure the centre of the keys.
            if self.choice is not None and self.choice.probing:
                self.choice.probe(self, query, key, value, output)
                return output
            return output.fill_(0)
        md = attn_metadata
        out = output[: md.num_actual_tokens]
        self._attend(layer.layer_name, query[: md.num_actual_tokens], kv_cache, md, out)
        if self.value_scale != 1.0:
            out.mul_(self.value_scale)
        return output

    def _attend(self, name: str, query, kv_cache, md: SpecAttnMetadata, out) -> None:
        """Attention over the cache's numbers as they are: values are not scaled yet."""
        if md.hook is not None:
            if self.sinks is not None or self.soft_cap is not None:
                raise NotImplementedError("baselines of evaluations attend without sinks and soft caps: leave them out")
            if md.hook.attend(name, query, kv_cache, md, self._scale, out):
                return
        if md.choice is not None and self.choice is not None:
            self._choose_and_attend(query, kv_cache, md, out)
            return
        source = md.sparse.layer_sources.get(name) if md.sparse is not None else None
        if source is None:
            self._dense(query, kv_cache, md, out, first_row=0, first_token=0)
            return
        plan = md.sparse
        self._read(query, kv_cache, md, plan, plan.page_table[source], plan.kept[source], out)

    @property
    def _scale(self) -> float:
        """Of products of queries and the cache's keys."""
        return self.scale * self.key_scale

    def _choose_and_attend(self, query, kv_cache, md: SpecAttnMetadata, out) -> None:
        """Short rows choose and read their selection; the rows after them are dense."""
        step = md.choice
        rows, tokens = slice(0, step.num_rows), slice(0, step.num_tokens)
        starts = md.query_start_loc[: step.num_rows + 1]
        batch = ChoiceBatch(query[tokens], kv_cache, md.block_table[rows], md.seq_lens[rows], starts, self._scale)
        with nullcontext() if step.follows else self.choice.clock:
            page_table, kept = self.choice.select(step, batch)
        confirm = functools.partial(self.choice.confirm, step, batch) if self.choice.confirms else None
        self._read(query, kv_cache, md, step, page_table, kept, out, confirm)

    def _read(
        self, query, kv_cache, md: SpecAttnMetadata, step: SparsePlan | ChoiceStep, page_table, kept, out, confirm=None
    ) -> None:
        """The step's first rows read through their page tables; the rows after them are dense. confirm(out, lse): may
        replace what was attended to."""
        rows, tokens = step.num_rows, step.num_tokens
        lse = None
        if self.audit is not None or self.sinks is not None or confirm is not None:
            lse = query.new_empty((tokens, self.num_heads), dtype=torch.float32)
        self.operations.sparse_attention(
            query[:tokens],
            kv_cache,
            page_table,
            kept,
            md.query_start_loc[: rows + 1],
            self._scale,
            out[:tokens],
            step.max_query_len,
            lse,
            self.soft_cap,
        )
        if confirm is not None:
            confirm(out[:tokens], lse)
        if self.sinks is not None and lse is not None:
            weigh_against_sinks(out[:tokens], lse, self.sinks)
        if self.audit is not None and lse is not None:
            self.audit.observe(query[:tokens], kv_cache, md, rows, self._scale, lse, self.soft_cap)
        if rows < md.num_reqs:
            self._dense(query, kv_cache, md, out, first_row=rows, first_token=tokens)

    def _dense(self, query, kv_cache, md: SpecAttnMetadata, out, *, first_row: int, first_token: int) -> None:
        starts = md.query_start_loc[first_row : md.num_reqs + 1]
        self.operations.dense_attention(
            query[first_token:],
            kv_cache,
            md.block_table[first_row:],
            md.seq_lens[first_row:],
            starts - first_token if first_token else starts,
            self._scale,
            out[first_token:],
            md.max_query_len,
            md.max_seq_len,
            self.sinks,
            self.query_scale,
            self.soft_cap,
        )

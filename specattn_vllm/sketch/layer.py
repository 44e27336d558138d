"""The sketch of one layer's keys: it is written together with the keys, and the layer's queries search it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from specattn_vllm.kernels.attention.reference import attend_by_logits
from specattn_vllm.kernels.sketch.layout import sketch_views
from specattn_vllm.selection.own_choice import LayerChoice
from specattn_vllm.selection.pages import page_strides

if TYPE_CHECKING:
    from specattn_vllm.selection.own_choice import ChoiceBatch, ChoiceStep, NewEntries
    from specattn_vllm.sketch.step import Sketch


def attend_densely(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    *,
    head_size: int,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    """Causal attention of one sequence without a KV cache. query, output [T, Hq, D] or flat; key, value [T, H, D] or
    flat. window: how many tokens a row sees, its own included; None for all. sinks [Hq]: the heads' sinks, if they have
    any. soft_cap: of the logits, if they have one."""
    tokens = query.shape[0]
    query, key, value, output = (x.view(tokens, -1, head_size) for x in (query, key, value, output))
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    seen = None
    if window is not None:
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril_().triu_(1 - window)
    if sinks is None and soft_cap is None:
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True
        )
        output.copy_(attended[0].transpose(0, 1))
    else:
        kv = torch.cat((k, v), dim=-1)[0].to(query.dtype)
        attend_by_logits(query, kv, scale, output, sinks, soft_cap, seen)


class LayerSketch(LayerChoice):
    """The sketch that a layer's implementation holds. ``index``: the layer's place among those that share a
    ``Sketch``."""

    def __init__(self, sketch: Sketch, index: int) -> None:
        self.sketch = sketch
        self.index = index
        self.confirms = sketch.guarantee is not None
        shape = (sketch.num_kv_heads, sketch.head_size)
        self.centre = torch.zeros(shape, dtype=torch.float32, device=sketch.device)
        """[H, D], rotated. It is measured once, before any key is written, and never changes."""
        self.probing = False
        """Whether a forward pass without a cache is the measurement of the centre."""
        self._cache: tuple[int, int] | None = None

    def set_centre(self, mean_key: torch.Tensor) -> None:
        """Set the centre, which is subtracted from all keys, to the layer's mean key [H, D] float32, as keys are in the
        cache."""
        # A model whose weights are not loaded yet may give NaN or infinity.
        mean_key = mean_key.nan_to_num(0.0, 0.0, 0.0)
        turned = mean_key @ self.sketch.rotation.float() * self.sketch.head_size**-0.5
        self.centre.copy_(turned)

    def probe(self, impl: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
        """Attend without a cache, and set the centre to the mean of the keys. Arguments as in `LayerChoice`."""
        size = self.sketch.head_size
        attend_densely(query, key, value, impl.scale, out, head_size=size, sinks=impl.sinks, soft_cap=impl.soft_cap)
        self.set_centre(key.view(key.shape[0], -1, size).float().mean(0) / impl.key_scale)

    def _views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # vLLM allocates the cache twice if it profiles CUDA graphs.
        key = (kv_cache.data_ptr(), kv_cache.shape[0])
        if self._cache != key:
            self.codes, self.scales = sketch_views(kv_cache, self.sketch.bits)
            self.page_strides = page_strides(kv_cache)
            self._cache = key
        return self.codes, self.scales

    def forget_cache(self) -> None:
        self._cache = self.codes = self.scales = None

    def write(self, new: NewEntries) -> bool:
        """Write new keys and values into the cache, and the keys' codes beside them."""
        sketch, codes = self.sketch, self._views(new.kv_cache)
        place = (new.slot_mapping, sketch.rotation, self.centre, *codes)
        sketch.operations.encode_keys(new.key, *place, new.value, new.kv_cache, new.key_scale, new.value_scale)
        return True

    def note_filled(self, key: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Write the codes of keys that are in the cache. Arguments as in `LayerChoice`."""
        sketch = self.sketch
        place = (slot_mapping, sketch.rotation, self.centre, *self._views(kv_cache))
        sketch.operations.encode_keys(key.to(sketch.rotation.dtype), *place)

    def select(self, step: ChoiceStep, batch: ChoiceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Search the sketch with all queries of each row, and list what is read. Arguments as in `LayerChoice`."""
        sketch, rows, operations = self.sketch, step.num_rows, self.sketch.operations
        page_table = sketch.page_table[self.index % sketch.page_table.shape[0], :rows]
        if step.follows:
            return page_table, sketch.following[self.index, :rows]
        codes, scales = self._views(batch.kv_cache)
        packed, factors, histogram = sketch.packed[:rows], sketch.factors[:rows], sketch.histogram[:rows]
        scores, chunks, dense = sketch.scores[:rows], sketch.chunks[:rows], sketch.dense[:rows]
        cuts, starts = sketch.cuts[:rows], sketch.starts[:rows]
        kept = sketch.kept[self.index, :rows]
        carried = (sketch.slots[:rows], sketch.totals, sketch.thresholds)
        budget = sketch.budget
        ends = (budget.sink, budget.recent)
        lengths = (batch.query_start_loc, batch.seq_lens)
        operations.prepare_queries(
            batch.query,
            *lengths,
            dense,
            sketch.valid_lens[:rows],
            batch.block_table,
            codes,
            scales,
            sketch.rotation,
            batch.scale,
            step.max_query_len,
            budget.dense_up_to,
            packed,
            factors,
            histogram,
        )
        operations.score_tokens(
            packed,
            factors,
            *lengths,
            dense,
            batch.block_table,
            codes,
            scales,
            *ends,
            budget.dense_up_to,
            scores,
            histogram,
            chunks,
        )
        if self.index == 0 and budget.shared == "layers":
            operations.carry_thresholds(*lengths, *carried, budget)
        operations.cut_scores(histogram, chunks, *lengths, dense, scores, *carried, budget, cuts, starts)
        self._list_pages(step, batch, kept)
        return page_table, kept

    def _list_pages(self, step: ChoiceStep, batch: ChoiceBatch, kept: torch.Tensor) -> None:
        sketch, rows = self.sketch, step.num_rows
        sketch.operations.list_pages(
            sketch.scores[:rows],
            sketch.cuts[:rows],
            sketch.starts[:rows],
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table,
            batch.kv_cache.shape[2],
            self.page_strides,
            sketch.budget.sink,
            sketch.budget.recent,
            sketch.ahead,
            sketch.page_table[self.index % sketch.page_table.shape[0], :rows],
            kept,
        )

    def confirm(self, step: ChoiceStep, batch: ChoiceBatch, out: torch.Tensor, lse: torch.Tensor) -> None:
        """KV heads that may lose more than the guarantee allows attend to everything. Arguments as in `LayerChoice`."""
        sketch, rows, guarantee = self.sketch, step.num_rows, self.sketch.guarantee
        assert guarantee is not None
        promise, operations = guarantee.promise, sketch.operations
        sample = (guarantee.positions[:rows], guarantee.worth[:rows])
        cuts, lost, again = sketch.cuts[:rows], guarantee.lost[:rows], guarantee.again[:rows]
        operations.sample_unread(
            sketch.scores[:rows],
            sketch.histogram[:rows],
            sketch.chunks[:rows],
            cuts,
            sketch.starts[:rows],
            batch.query_start_loc,
            batch.seq_lens,
            sketch.budget.sink,
            sketch.budget.recent,
            self.index,
            *sample,
        )
        operations.bound_lost(
            batch.query,
            batch.kv_cache,
            batch.block_table,
            batch.query_start_loc,
            *sample,
            lse,
            batch.scale,
            promise.quantile,
            step.max_query_len,
            lost,
        )
        fallen = lost > promise.epsilon
        guarantee.fallen[self.index, :rows].copy_(fallen)
        # Threshold -1 lists everything. Attention leaves heads without entries as they are.
        cuts[..., 0].masked_fill_(fallen, -1)
        self._list_pages(step, batch, again)
        again.mul_(fallen)
        page_table = sketch.page_table[0, :rows]
        operations.sparse_attention(
            batch.query,
            batch.kv_cache,
            page_table,
            again,
            batch.query_start_loc,
            batch.scale,
            out,
            step.max_query_len,
            lse,
        )
        sketch.kept[self.index, :rows].add_(again)

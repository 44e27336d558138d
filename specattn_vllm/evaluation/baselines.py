"""Other work's selections in the place of ours, for comparison: same text, positions, rows and accounting.

A baseline attends for the rows that verify, in plain PyTorch over the paged cache, in engines without graphs; prompts
stay dense. As with our methods, one selection serves all K + 1 rows of a verification. It is made of the tokens before
them (the prefix); the rows also read each other, causally. A method that chooses per query in its paper chooses here by
the mean distribution over the rows and the query heads of a KV head, because these are read together.

`SELECT` has for each a function (options, Row) -> Selected, which says what is kept of the prefix. Options, and the
bytes that are searched, are in `schema.py`:

quest     whole pages, by an upper bound of their scores (Tang et al., ICML 2024, arXiv 2406.10774):
              score(q, page) = scale * sum_d max(q_d least_d, q_d largest_d)
mean_std  whole pages, by the mean and the standard deviation of their keys, where Quest has the middle and half of the
          range: as much to read, and a single token moves it less:
              score(q, page) = scale * (q . mean + |q| . std)
channels  tokens, by a few channels of their keys, as Double Sparsity does (Yang et al., arXiv 2408.07092):
              score(q, token) = scale * sum over the chosen d of q_d k_d
oracle    tokens, by the target's own attention in the very rows that are verified: what no selection of its size can
          know better
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from specattn_vllm.evaluation.schema import BaselineOptions, Channels, MeanStd, Oracle, Quest
from specattn_vllm.executors import Operations
from specattn_vllm.stats import Counters


class Row(NamedTuple):
    """A row that verifies, in one layer: Q tokens after a prefix of L; G query heads for each of the H KV heads."""

    query: torch.Tensor
    """[H, G, Q, D] float32"""
    keys: torch.Tensor
    """[H, L, D] float32, of the prefix."""
    weights: torch.Tensor
    """[H, G, Q, L], what full attention gives the prefix."""
    scale: float


class Selected(NamedTuple):
    kept: torch.Tensor
    """[H, L] bool, tokens of the prefix that each KV head reads."""
    searched: int
    """Entries of each KV head that were searched for them."""


def mean(found: torch.Tensor) -> torch.Tensor:
    """[H, G, Q, X], over query heads and tokens: [H, X]."""
    return found.flatten(1, 2).mean(1)


def heaviest(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest of weights [H, X], as [H, X] bool."""
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, weights.topk(count).indices, True)


def budget(ratio: float, length: int) -> int:
    """Tokens for a share of a length, rounded as `select_top_p` does."""
    return (length * round(ratio * 65536) + 65535) >> 16


def pages_of(keys: torch.Tensor, size: int) -> torch.Tensor:
    """[H, P, size, D], not a number behind the last token."""
    return F.pad(keys, (0, 0, 0, -keys.shape[1] % size), value=torch.nan).unflatten(1, (-1, size))


def best_pages(options: Quest | MeanStd, row: Row, scores: torch.Tensor, *, first: bool = False) -> Selected:
    """Those with the largest scores [H, G, Q, P], up to a share of the prefix, in whole pages, and among them always
    the page that the prefix ends in, and the `first` where asked for, if there is room for two. The order for a single
    query is that of its scores."""
    weights, size, length = mean((scores * row.scale).softmax(-1)), options.page_size, row.keys.shape[1]
    if first:
        weights[:, 0] = 2.0
    weights[:, -1] = torch.inf
    kept = heaviest(weights, -(-budget(options.ratio, length) // size))
    return Selected(kept.repeat_interleave(size, dim=1)[:, :length], weights.shape[1] * size)


def quest(options: Quest, row: Row) -> Selected:
    pages = pages_of(row.keys, options.page_size)
    least, largest = pages.nan_to_num(torch.inf).amin(2), pages.nan_to_num(-torch.inf).amax(2)
    bounds = torch.einsum("hgqd,hpd->hgqp", row.query.clamp(min=0), largest)
    bounds += torch.einsum("hgqd,hpd->hgqp", row.query.clamp(max=0), least)
    return best_pages(options, row, bounds)


def mean_std(options: MeanStd, row: Row) -> Selected:
    """The first page is always read: what all queries attend to there is a token or two, which a mean does not show."""
    pages = pages_of(row.keys, options.page_size)
    means = pages.nanmean(2)
    deviations = (pages - means[:, :, None]).square().nanmean(2).sqrt()  # of the page's tokens, not a sample's
    scores = torch.einsum("hgqd,hpd->hgqp", row.query, means)
    scores += torch.einsum("hgqd,hpd->hgqp", row.query.abs(), deviations)
    return best_pages(options, row, scores, first=True)


def channels(options: Channels, row: Row) -> Selected:
    """The channels of a KV head are those with the largest |q_d| |k_d|, mean over the round's queries times mean over
    the context's keys. The paper calibrates that before; of the very round, no calibration could know better."""
    length, size = row.keys.shape[1:]
    if options.channels > size:
        raise ValueError(f"baseline 'channels': channels {options.channels}, but keys have {size} elements: lower it")
    chosen = (row.keys.abs().mean(1) * row.query.abs().mean((1, 2))).topk(options.channels).indices
    keys = row.keys.gather(2, chosen[:, None].expand(-1, length, -1))
    query = row.query.gather(3, chosen[:, None, None].expand(*row.query.shape[:3], -1))
    scores = torch.einsum("hgqd,hld->hgql", query, keys) * row.scale
    return Selected(heaviest(mean(scores.softmax(-1)), budget(options.ratio, length)), length)


def oracle(options: Oracle, row: Row) -> Selected:
    return Selected(heaviest(mean(row.weights), budget(options.ratio, row.keys.shape[1])), 0)


SELECT = {"quest": quest, "mean_std": mean_std, "channels": channels, "oracle": oracle}


def install(worker: Any, options: BaselineOptions) -> None:
    """Put a baseline into the target of a worker whose options are method 'dense'."""
    from vllm.model_executor.models.utils import extract_layer_index

    from specattn_vllm.speculation.wiring import target_builder

    groups, speculator = worker.model_runner.attn_groups, worker.model_runner.speculator
    names = {name for of in groups for group in of for name in group.layer_names}
    names = sorted(names - speculator.draft_attn_layer_names, key=extract_layer_index)
    builder = target_builder(groups, names)
    builder.substitute = Baseline(options, speculator.operations, speculator.counters, names).begin


class Baseline:
    """One baseline in one engine: tells which rows of a step verify, and attends for them."""

    def __init__(
        self, options: BaselineOptions, operations: Operations, counters: Counters, layer_names: list[str]
    ) -> None:
        """layer_names: the target's, in order."""
        if options.dense_layers >= len(layer_names):
            raise ValueError(
                f"baseline {options.name!r}: dense_layers {options.dense_layers} leaves none of the target's "
                f"{len(layer_names)} layers to select in: lower it"
            )
        self.options = options
        self.operations = operations
        self.counters = counters
        self.selecting = set(layer_names[options.dense_layers :])

    def begin(self, common: Any) -> BaselineStep | None:
        """The step of vLLM's common metadata; None where nothing verifies, as in profiling runs and prompts."""
        if common.req_idx is None or common.is_prefilling is None:
            return None
        real = len(common.req_idx)
        starts, prefilling = common.query_start_loc_cpu[: real + 1].tolist(), common.is_prefilling[:real].tolist()
        spans = {row: slice(*starts[row : row + 2]) for row in range(real) if not prefilling[row]}
        spans = {row: span for row, span in spans.items() if span.start < span.stop}
        if not spans:
            return None
        self.counters.stage(verify_rows=len(spans), sparse_rows=len(spans))
        return BaselineStep(self, spans)


class BaselineStep(NamedTuple):
    """One step of the target in which rows verify: row of the batch -> its tokens."""

    baseline: Baseline
    spans: dict[int, slice]

    def attend(self, layer_name: str, query, kv_cache, batch, scale: float, out) -> bool:
        """Attention of one layer, for all rows; arguments as `TargetStep.attend`, kv_cache [B, H, N, 2D]."""
        lengths, longest = (batch.seq_lens, batch.query_start_loc), (batch.max_query_len, batch.max_seq_len)
        self.baseline.operations.dense_attention(query, kv_cache, batch.block_table, *lengths, scale, out, *longest)
        heads, tokens = kv_cache.shape[1], batch.seq_lens.tolist()
        read = full = heads * sum(tokens[row] for row in self.spans)
        searched = 0
        if layer_name in self.baseline.selecting:
            read = 0
            for row, span in self.spans.items():
                blocks = batch.block_table[row]
                kept, looked_at = self._attend(query[span], kv_cache, blocks, tokens[row], scale, out[span])
                read, searched = read + kept, searched + heads * looked_at
        self.baseline.counters.stage(kv_read=read, kv_full=full, kv_scanned=searched)
        return True

    def _attend(self, query, kv_cache, blocks, length: int, scale: float, out) -> tuple[torch.Tensor, int]:
        """For one row; returns entries read, and those searched by each head."""
        heads, size, width = kv_cache.shape[1:]
        entries = kv_cache[blocks[: -(-length // size)].long()].transpose(0, 1).flatten(1, 2)[:, :length].float()
        keys, values = entries.split(width // 2, dim=-1)
        count, there = query.shape[0], torch.arange(length, device=query.device)
        prefix = length - count
        query = query.float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
        logits = torch.einsum("hgqd,hld->hgql", query, keys) * scale
        logits = logits.masked_fill(there > there[prefix:, None], -torch.inf)
        given = logits.softmax(-1)[..., :prefix]
        kept, searched = SELECT[self.baseline.options.name](
            self.baseline.options, Row(query, keys[:, :prefix], given, scale)
        )
        logits[..., :prefix] = logits[..., :prefix].masked_fill(~kept[:, None, None], -torch.inf)
        found = torch.einsum("hgql,hld->qhgd", logits.softmax(-1), values)
        out.copy_(found.flatten(1, 2))
        return kept.sum() + count * heads, searched

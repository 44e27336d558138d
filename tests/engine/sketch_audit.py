"""Looks at each choice of an engine of method 'sketch', from the cache and the scores alone."""

from __future__ import annotations

import torch

from specattn_vllm.kernels.sketch import reference
from specattn_vllm.sketch.layer import LayerSketch


class Audit:
    """Looks at each choice of an engine: what it may read, how much, and whether the sketch is that of the cache."""

    def __init__(self) -> None:
        self.choices = 0
        self.pruned = 0
        self.followed = 0
        """Draft steps and layers that read what the first step of a round chose."""
        self.chosen: dict = {}
        self.read = self.wanted = 0
        """Tokens that all heads of the choices by carried thresholds read, and were to read on average."""

    def watch(self, monkeypatch) -> None:
        select = LayerSketch.select

        def watched(layer, step, batch):
            table, kept = select(layer, step, batch)
            for row in range(step.num_rows):
                look = self.follow if step.follows else self.check
                look(layer, row, *batch[1:-1], table, kept)
            return table, kept

        monkeypatch.setattr(LayerSketch, "select", watched)

    def follow(self, layer, row, kv_cache, block_table, seq_lens, query_start_loc, table, kept) -> None:
        """A draft step reads what the first of its round chose, and all that came after that."""
        del query_start_loc
        chosen, context = self.chosen[layer, row]
        length, size = int(seq_lens[row]), kv_cache.shape[2]
        if chosen is None:
            assert not kept[row].any()
            return
        self.followed += 1
        per_block, per_head, per_token = layer.page_strides
        for head, before in enumerate(chosen):
            p = torch.tensor([*before, *range(context, length)], device=block_table.device)
            pages = block_table[row, p // size] * per_block + p % size * per_token + head * per_head
            assert table[row, head, : kept[row, head]].tolist() == pages.tolist()

    def check(self, layer, row, kv_cache, block_table, seq_lens, query_start_loc, table, kept) -> None:
        sketch, length = layer.sketch, int(seq_lens[row])
        context = length - int(query_start_loc[row + 1] - query_start_loc[row])
        self.chosen[layer, row] = None, 0
        if length <= 0:
            assert not kept[row].any()
            return
        size = kv_cache.shape[2]
        p = torch.arange(length, device=kv_cache.device)
        blocks, offsets = block_table[row, p // size].long(), p % size
        keys = kv_cache[blocks, :, offsets, : sketch.head_size]
        # The sketch of each token is that of the key in its slot, however it came there.
        codes, scales = layer._views(kv_cache)
        fresh, worth = torch.zeros_like(codes), torch.zeros_like(scales)
        slots = blocks * size + offsets
        keys = keys.to(sketch.rotation.dtype)  # of an fp8 cache, too
        reference.encode_keys(keys.contiguous(), slots, sketch.rotation, layer.centre, fresh, worth)
        # A kernel may round an element on the border between two levels the other way.
        apart = (codes[blocks, :, offsets] != fresh[blocks, :, offsets]).float().mean()
        assert apart <= (0.0 if sketch.operations.name == "torch" else 1e-3)
        torch.testing.assert_close(scales[blocks, :, offsets], worth[blocks, :, offsets], rtol=2e-3, atol=0)
        self.choices += 1
        per_block, per_head, per_token = layer.page_strides
        places = (blocks * per_block + offsets * per_token).tolist()
        budget, numbers = sketch.budget, []
        self.chosen[layer, row] = [], context
        whole = bool(sketch.dense[row]) or context <= budget.dense_up_to
        for head in range(sketch.num_kv_heads):
            pages = table[row, head, : kept[row, head]]
            of_page = {place + head * per_head: i for i, place in enumerate(places)}
            read = [of_page[page] for page in pages.tolist()]  # a KeyError: a page of nobody's, or of another request
            assert read == sorted(set(read))
            self.chosen[layer, row][0].append([i for i in read if i < context])
            if whole:
                assert read == list(range(length))
                continue
            must = {*range(budget.sink), *range(context - budget.recent, length)}
            assert must <= set(read)
            scores = sketch.scores[row, head, :context].tolist()
            free = [i for i in range(context) if i not in must]
            left, taken = set(free) - set(read), set(free) & set(read)
            assert max((scores[i] for i in left), default=0) <= min((scores[i] for i in taken), default=255)
            numbers.append(len(read) - (length - context))
        if not whole and sketch.budget.top_p is None:
            self.pruned += 1
            wanted = max((context * budget.fixed_ratio + 65535) >> 16, budget.min_tokens)
            slot = int(sketch.slots[row])
            if budget.shared == "layers" and sketch.thresholds[slot, 0] >= 0:
                self.read += sum(numbers)
                self.wanted += wanted * sketch.num_kv_heads
            else:
                assert sum(numbers) == wanted * sketch.num_kv_heads
            assert min(numbers) >= min(budget.min_tokens, wanted)
            if budget.shared == "none":
                assert set(numbers) == {wanted}

"""What must hold in an engine after every step, whatever came before: held against the scheduler and the weights, not
against what the plugin was told."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.states import RequestState

from specattn_vllm.backend.impl import SpecAttnImpl
from specattn_vllm.kernels.bookkeeping.contracts import NO_SELECTION
from specattn_vllm.kernels.sketch.contracts import BINS
from specattn_vllm.selection.pages import page_strides
from specattn_vllm.sketch.layer import LayerSketch
from specattn_vllm.sketch.step import Sketch


class Watch:
    """Looks at one engine at a time, from `attend` on."""

    def __init__(self, monkeypatch: Any, cache_checks: Any) -> None:
        """cache_checks: the module of that name."""
        self.cache_checks = cache_checks
        self.runner: Any = None
        self.seen: Counter[str] = Counter()
        self._patch(monkeypatch)

    def attend(self, llm: Any, audit: Any, lossless: bool) -> None:
        """Look at this engine from now on. audit: that of `conftest.py`. lossless: whether every verification reads
        everything."""
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler, self.manager = core.scheduler, core.scheduler.kv_cache_manager
        [self.runner] = llm.collective_rpc(lambda worker: worker.model_runner)
        config = llm.llm_engine.vllm_config
        self.block_size, self.vocabulary = config.cache_config.block_size, config.model_config.get_vocab_size()
        self.most_a_step = 1 + (config.speculative_config.num_speculative_tokens if config.speculative_config else 0)
        self.layers = get_layers_from_vllm_config(config, AttentionLayerBase)
        groups = self.scheduler.kv_cache_config.kv_cache_groups
        self.group = {name: g for g, group in enumerate(groups) for name in group.layer_names}
        self.lossless, self.ahead = lossless, bool(config.scheduler_config.async_scheduling)
        self.audit, self.exact, self.steps = audit, {}, 0
        self.store = getattr(getattr(self.runner.speculator, "selection", None), "store", None)
        self.spoilt: set[int] = set()  # slots in whose selections we have put another length
        self.fresh: set[int] = set()  # slots whose request has not chosen yet
        self.batch: Any = None
        self.sampled: list[int] | None = None  # tokens that each row sampled, while a drafter drafts
        self.free = self.manager.block_pool.get_num_free_blocks()
        self.buffers = self.cache_checks.buffers(self.runner)
        layers = self.layers.items()
        self.sketches = {n: x for n, x in layers if isinstance(getattr(x.impl, "choice", None), LayerSketch)}
        self.centres = {name: layer.impl.choice.centre.clone() for name, layer in self.sketches.items()}
        self.first_layers = self.cache_checks.first_layers(self.runner, self.layers)

    def _patch(self, monkeypatch: Any) -> None:
        patched = [
            (GPUModelRunner, "prepare_inputs", self._prepared),
            (GPUModelRunner, "sample", self._sampled),
            (RequestState, "add_request", self._entered),
            (SpecAttnImpl, "forward", self._forward),
            (SpecAttnImpl, "_read", self._read),
            (LayerSketch, "select", self._select),
            (Scheduler, "_preempt_request", self._preempted),
        ]
        for owner, name, ours in patched:
            monkeypatch.setattr(owner, name, self._around(getattr(owner, name), ours))

    def _around(self, original: Any, ours: Any) -> Any:
        def around(this, *args, **kwargs):
            if self.runner is None:
                return original(this, *args, **kwargs)
            return ours(original, this, *args, **kwargs)

        return around

    @contextlib.contextmanager
    def nobody(self) -> Iterator[None]:
        """While vLLM runs made-up requests."""
        runner, self.runner = self.runner, None
        yield
        self.runner = runner

    def unless_nobody(self, look: Any) -> Any:
        """A look of somebody else's, but not at made-up requests."""
        return lambda *args: None if self.runner is None else look(*args)

    # What is seen in a step.

    def _prepared(self, original, runner, *args, **kwargs):
        self.batch, self.sampled = original(runner, *args, **kwargs), None
        if self.store is not None:
            slots = self.batch.idx_mapping_np
            self.spoilt.difference_update(slots.tolist())
            # The worst that the slot of a prompt may hold: a selection that fits, by whoever had the slot before.
            inside = self.batch.is_prefilling_np & (self.batch.num_computed_tokens_np > 0)
            for slot, computed in zip(slots[inside], self.batch.num_computed_tokens_np[inside], strict=True):
                self.store.prefix_lens[int(slot)] = int(computed)
            short = inside & (self.batch.num_scheduled_tokens <= self.most_a_step)
            self.seen["short chunks in slots with a selection"] += int(short.sum())
        return self.batch

    def spoil(self) -> None:
        """No selection fits the next step any more."""
        if self.store is None:
            return
        kept = self.store.prefix_lens > 0
        self.store.prefix_lens[kept] -= 1
        self.spoilt.update(kept.nonzero().flatten().tolist())
        self.audit.made_for.clear()
        self.seen["spoilt"] += int(kept.sum())

    def _sampled(self, original, runner, hidden_states, batch, *args, **kwargs):
        assert hidden_states[: batch.num_tokens].isfinite().all(), "hidden states are not finite"
        result = original(runner, hidden_states, batch, *args, **kwargs)
        self.sampled = result[1].tolist()
        return result

    def _entered(self, original, states, req_id, *args, **kwargs):
        original(states, req_id, *args, **kwargs)
        self.fresh.add(states.req_id_to_index[req_id])

    def _preempted(self, original, scheduler, *args, drop_stale_output=False, **kwargs):
        # Only `Recall` drops anything.
        self.seen["recalled" if drop_stale_output else "preempted"] += 1
        return original(scheduler, *args, drop_stale_output=drop_stale_output, **kwargs)

    def _forward(self, original, impl, layer, *args, **kwargs):
        self.layer = layer.layer_name
        return original(impl, layer, *args, **kwargs)

    def _select(self, original, layer, step, batch):
        """A request's first choice carries nothing of who had the slot before."""
        sketch = layer.sketch
        carries = layer.index == 0 and sketch.budget.shared == "layers" and not step.follows
        slots = sketch.slots[: step.num_rows].tolist() if carries else []
        for row, slot in enumerate(slots):
            held = self.runner.req_states.req_id_to_index[self.batch.req_ids[row]]
            assert slot == held, f"row {row} is in slot {held}, and its choice in {slot}"
            assert slot not in self.fresh or not sketch.totals[slot].any(), f"slot {slot}: somebody else's totals"
        result = original(layer, step, batch)
        for row, slot in enumerate(slots):
            if slot in self.fresh:
                assert sketch.thresholds[slot, 0] < 0, f"slot {slot}: somebody else's threshold"
                if sketch.totals[slot, BINS]:
                    self.fresh.discard(slot)
            self.seen["choices with a threshold"] += int(sketch.thresholds[slot, 0] >= 0 and not sketch.dense[row])
        return result

    def _read(self, original, impl, query, kv_cache, md, step, page_table, kept, out, *more):
        """Every page is one of the request's own, in order, and the step's own tokens are last."""
        block, per_head, token = page_strides(kv_cache)
        pages, before = page_table.cpu(), kept.clone()
        for row in range(min(step.num_rows, len(self.batch.req_ids))):
            name = self.batch.req_ids[row]
            request, new = self.scheduler.requests[name], int(md.query_start_loc[row + 1] - md.query_start_loc[row])
            length, least = request.num_computed_tokens, None
            if self.ahead:  # the scheduler does not know yet which drafts were rejected
                length = int(self.runner.req_states.num_computed_tokens.gpu[self.batch.idx_mapping[row]]) + new
            if self.sampled is not None:
                if not self.sampled[row]:
                    continue  # it is inside its prompt: what is drafted for it is thrown away
                computed = int(self.runner.req_states.num_computed_tokens.gpu[self.batch.idx_mapping[row]])
                least, length = computed + 1, max(length + 1, computed + self.most_a_step - 1)
            own = torch.tensor(self.manager.get_block_ids(name)[self.group[self.layer]])
            at = (own[:, None] * block + torch.arange(self.block_size) * token).flatten()
            place = torch.full((kv_cache.shape[0] * block,), -1)
            for head in range(pages.shape[1]):
                number = int(kept[row, head])
                assert number <= md.seq_lens[row], f"{name}: {number} read of {md.seq_lens[row]}"
                place[at + head * per_head] = torch.arange(len(at))
                read = place[pages[row, head, :number].long()]
                place.fill_(-1)
                what = f"{name}, {self.layer}, head {head}, length {length}"
                assert (read >= 0).all(), f"{what}: pages of nobody's or of somebody else's"
                assert (read.diff() > 0).all(), f"{what}: not in order"
                if least is None:
                    assert read[-new:].tolist() == [*range(length - new, length)], f"{what}: not its own tokens"
                    if self.lossless or self._exact(name) or self.batch.is_prefilling_np[row]:
                        assert number == length, f"{what}: {number} read, and all were wanted"
                    self.seen["rows that read a part"] += int(number < length)
                else:
                    assert least <= read[-1] + 1 <= length, f"{what}: read up to {read[-1]}, {least - 1} computed"
                    self.seen["draft rows that read a part"] += int(number < read[-1] + 1)
        original(impl, query, kv_cache, md, step, page_table, kept, out, *more)
        fell = (kept != before).nonzero()  # with a guarantee: these heads have read everything too
        assert torch.equal((kept - before)[*fell.T], md.seq_lens[fell[:, 0]])
        self.seen["heads that fell"] += len(fell)

    # What is seen after a step.

    def _exact(self, name: str) -> bool:
        return self.exact[name.rpartition("-")[0]]  # vLLM adds something of its own to a name

    def holders(self) -> list[str]:
        """Requests that hold blocks."""
        return [name for name in self.scheduler.requests if any(self.manager.get_block_ids(name))]

    def stage(self, name: str) -> str:
        [request] = [r for r in self.scheduler.requests.values() if r.request_id.rpartition("-")[0] == name]
        if request.status != RequestStatus.RUNNING:
            return "waiting"
        return "decoding" if request.num_output_tokens else "in its prompt"

    def after_step(self) -> None:
        assert not self.audit.violations, self.audit.violations[:3]
        self.steps += 1
        states, used = self.runner.req_states, Counter()
        running = {}
        for name, slot in states.req_id_to_index.items():
            request = self.scheduler.requests.get(name)
            if request is not None:  # else it has ended, and the worker hears of that in the next step
                assert request.status == RequestStatus.RUNNING, f"{name} holds slot {slot}, and is {request.status}"
                running[slot] = request
        for request in self.scheduler.requests.values():
            for ids in self.manager.get_block_ids(request.request_id):
                used.update(ids)
        pool = self.manager.block_pool
        wrong = [b.block_id for b in pool.blocks if not b.is_null and b.ref_cnt != used[b.block_id]]
        assert not wrong, f"blocks {wrong} are not held as often as they are used"
        assert pool.get_num_free_blocks() == self.free - len(used)
        for slot, request in running.items():
            self._request(slot, request)
        self._slots(running)
        self._caches(running)

    def _request(self, slot: int, request: Any) -> None:
        """Worker and scheduler know the same of a request."""
        name, states, tables = request.request_id, self.runner.req_states, self.runner.block_tables
        for g, ids in enumerate(self.manager.get_block_ids(name)):
            number = int(tables.num_blocks.np[g, slot])
            assert tables.block_tables[g].gpu[slot, :number].tolist() == ids, f"{name}: other blocks in the worker"
        computed, total = int(states.num_computed_tokens.gpu[slot]), int(states.total_len.gpu[slot])
        unknown = total - request.num_tokens if request.num_output_tokens else 0  # none, unless planned ahead
        assert 0 <= unknown <= self.ahead * self.most_a_step, name
        assert 0 <= request.num_computed_tokens - computed <= self.ahead * self.most_a_step, name
        assert not request.num_output_tokens or computed < total, name
        self.seen["tokens that the scheduler does not know yet"] += unknown
        assert states.all_token_ids.gpu[slot, : request.num_tokens].tolist() == list(request.all_token_ids), name

    def _slots(self, running: dict[int, Any]) -> None:
        """What is kept by slot is of the request that holds it."""
        target = getattr(self.runner, "specattn_target", None)
        for slot, request in running.items():
            name, exact = request.request_id, self._exact(request.request_id)
            if target is not None:
                assert target.exact[slot] == exact, f"{name}: exact is {target.exact[slot]} in slot {slot}"
                if isinstance(target.chooser, Sketch) and slot in self.fresh:
                    assert not target.chooser.totals[slot].any(), f"{name}: totals of slot {slot} are somebody else's"
            if self.store is not None:
                flags = bool(self.store.exact[slot]), bool(self.store._exact_on_host[slot])
                assert flags == (exact, exact), f"{name}: exact is {flags} in slot {slot}"
                if slot in self.spoilt:
                    continue
                states, made = self.runner.req_states, int(self.store.prefix_lens[slot])
                allowed = {NO_SELECTION} if exact else {NO_SELECTION, int(states.num_computed_tokens.gpu[slot])}
                assert made in allowed, f"{name}: a selection for {made} tokens, and allowed are {allowed}"
                if int(states.total_len.gpu[slot]) <= request.num_prompt_tokens:
                    assert made == NO_SELECTION, f"{name}: a selection inside its prompt"

    def _caches(self, running: dict[int, Any]) -> None:
        """Keys, values and codes of all computed tokens are right, however they came there."""
        computed, tokens_of = (getattr(self.runner.req_states, n).gpu for n in ("num_computed_tokens", "all_token_ids"))
        for name, layer in self.sketches.items():
            for slot, request in running.items():
                where = self._where(name, request, int(computed[slot]))
                self.cache_checks.codes(layer, *where, f"{request.request_id}, {name}")
                self.seen["codes"] += len(where[0])
        for name, model in self.first_layers.items():
            for slot, request in running.items():
                where, tokens = self._where(name, request, int(computed[slot])), tokens_of[slot].tolist()
                self.cache_checks.keys(model, self.layers[name], tokens, *where, f"{request.request_id}, {name}")
                self.seen["keys"] += len(where[0])

    def _where(self, layer: str, request: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block, and offset in it, of a request's first tokens."""
        own = torch.tensor(self.manager.get_block_ids(request.request_id)[self.group[layer]])
        p = torch.arange(length)
        return own[p // self.block_size], p % self.block_size

    def at_rest(self) -> None:
        """When all requests have ended, nothing is left of them."""
        self.after_step()
        assert not self.scheduler.requests and not self.runner.req_states.req_id_to_index
        assert sorted(self.runner.req_states.free_indices) == [*range(self.runner.max_num_reqs)]
        free = self.manager.block_pool.get_num_free_blocks()
        assert free == self.free, f"{free} free blocks, and {self.free} at the start"
        moved = {
            name for name, address in self.cache_checks.buffers(self.runner).items() if self.buffers[name] != address
        }
        assert not moved, f"other buffers than at the start: {moved}"
        for name, layer in self.sketches.items():
            assert torch.equal(layer.impl.choice.centre, self.centres[name]), f"{name}: its centre has changed"

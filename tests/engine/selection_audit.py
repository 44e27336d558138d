"""An audit of what engines with stored selections read, step by step."""

from dataclasses import dataclass, field


@dataclass
class Audit:
    """What every row of a pruned step read, checked against who the selection was made for, bit by bit."""

    owner: dict[int, str] = field(default_factory=dict)
    """slot -> request that holds it now."""
    made_for: dict[int, tuple] = field(default_factory=dict)
    """slot -> (request, context length, bits [S, G, W]) of the selection stored there."""
    sparse_rows: dict[str, int] = field(default_factory=dict)
    """request -> rows that read a selection."""
    dense_rows: dict[str, int] = field(default_factory=dict)
    """request -> rows past the prompt that read everything."""
    prefill_rows: list[tuple[str, int, int]] = field(default_factory=list)
    """(request, new tokens, tokens read) of short prefill chunks among verifications."""
    preemptions: int = 0
    violations: list[str] = field(default_factory=list)

    def watch(self, monkeypatch) -> None:
        """Watch the engines that are made from now on."""
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.worker.gpu.states import RequestState

        from specattn_vllm.kernels.reference import unpack_bits
        from specattn_vllm.selection.pruner import Pruner
        from specattn_vllm.selection.store import SelectionStore

        seen = self
        add_request, put, prune = RequestState.add_request, SelectionStore.put, Pruner.prune
        preempt = Scheduler._preempt_request

        def watch_add(self, req_id, *args, **kwargs):
            result = add_request(self, req_id, *args, **kwargs)
            seen.owner[self.req_id_to_index[req_id]] = req_id
            return result

        def watch_put(self, slots, bits, prefix_lens):
            for row, (slot, length) in enumerate(zip(slots.tolist(), prefix_lens.tolist(), strict=True)):
                if slot < 0:
                    continue  # a row that only fills a graph's batch
                seen.made_for[slot] = (seen.owner[slot], length, bits[:, row].clone())
            put(self, slots, bits, prefix_lens)

        def watch_prune(self, **step):
            plan = prune(self, **step)
            lengths = (step["query_start_loc"][1:] - step["query_start_loc"][:-1]).tolist()
            for row in range(plan.num_rows if plan is not None else 0):
                slot, total, new = int(step["slots"][row]), int(step["seq_lens"][row]), lengths[row]
                request = seen.owner.get(slot, "nobody")
                kept = plan.kept[:, row].flatten().tolist()
                if bool(step["prefilling_cpu"][row]):
                    seen.prefill_rows.append((request, new, kept[0]))
                    if kept != [total] * len(kept):
                        seen.violations.append(f"{request} is prefilling and read {kept} of {total}")
                    continue
                made = seen.made_for.get(slot)
                if made is None or made[:2] != (request, total - new):
                    # Nothing that is good for this row: it must have read everything.
                    seen.dense_rows[request] = seen.dense_rows.get(request, 0) + 1
                    if kept != [total] * len(kept):
                        seen.violations.append(f"{request}, {total - new} computed, read {kept} by {made and made[:2]}")
                    continue
                seen.sparse_rows[request] = seen.sparse_rows.get(request, 0) + 1
                flags = unpack_bits(made[2], total - new)
                blocks = step["block_table"][row].tolist()
                block, per_head, token = self.page_strides()
                for t, head, source, group in made_from(self):
                    positions = [*flags[source, group].nonzero().flatten().tolist(), *range(total - new, total)]
                    ids = [
                        blocks[p // self.block_size] * block + head * per_head + p % self.block_size * token
                        for p in positions
                    ]
                    if plan.page_table[t, row, head, : int(plan.kept[t, row, head])].tolist() != ids:
                        seen.violations.append(f"{request}: table {t} of head {head} is not what source {source} chose")
            return plan

        def made_from(pruner):
            """(table, head, source, group) of every table: each of its own, where there are no maps."""
            if pruner.maps is None:
                sources, _, groups, _ = pruner.store.bits.shape
                return [(source, group, source, group) for source in range(sources) for group in range(groups)]
            tables = zip(pruner.maps.sources.tolist(), pruner.maps.groups.tolist(), strict=True)
            return [(t, h, source, g) for t, (source, groups) in enumerate(tables) for h, g in enumerate(groups)]

        def watch_preempt(self, *args, **kwargs):
            seen.preemptions += 1
            return preempt(self, *args, **kwargs)

        monkeypatch.setattr(RequestState, "add_request", watch_add)
        monkeypatch.setattr(SelectionStore, "put", watch_put)
        monkeypatch.setattr(Pruner, "prune", watch_prune)
        monkeypatch.setattr(Scheduler, "_preempt_request", watch_preempt)

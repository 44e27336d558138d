"""Joining draft and target: what is made of a layer map, and what does not fit is refused with numbers and a remedy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specattn_vllm import executors, layer_map
from specattn_vllm.fingerprint import ModelFacts
from specattn_vllm.layer_map import SCHEMA, LayerMap, uniform
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.speculation import announce as announcing
from specattn_vllm.speculation import maps, wiring
from specattn_vllm.speculation.wiring import Selection
from specattn_vllm.stats import Counters

GIB = 2**30
CPU = torch.device("cpu")
REQUESTS, LONGEST, DRAFT_HEADS, KV_HEADS, STEPS = 3, 70, 4, 2, 4
ROW = 128  # LONGEST, rounded up to whole vectors


# Attaching the pruner


def selection_for(*names: str) -> Selection:
    return Selection(
        capture=None, store=None, pruner=SimpleNamespace(layer_sources=dict.fromkeys(names, 0)), tables=None
    )


@pytest.mark.parametrize("groups", [[], [["a"], ["b"]]], ids=["none", "two"])
def test_target_layers_in_several_attention_groups_are_refused(groups):
    made = [[SimpleNamespace(layer_names=names) for names in groups]]
    with pytest.raises(ValueError, match=f"one attention group, but vLLM made {len(groups)}"):
        selection_for("a", "b").attach(made)


def test_the_pruner_goes_to_the_builder_of_the_layers_it_prunes(monkeypatch):
    cache = torch.zeros(3, 4, 2, 8).transpose(1, 2)
    builder = SimpleNamespace(vllm_config="config", kv_cache_spec=SimpleNamespace(block_size=16), pruner=None)
    other = SimpleNamespace(pruner=None)
    layers = {"a": SimpleNamespace(kv_cache=cache), "draft": SimpleNamespace(kv_cache=None)}
    monkeypatch.setattr(wiring, "get_layers_from_vllm_config", lambda config, base: layers)
    selection, told = selection_for("a"), []
    selection.pruner.attach = lambda *arguments: told.append(arguments)
    selection.attach(
        [
            [SimpleNamespace(layer_names=["draft"], metadata_builders=[other])],
            [SimpleNamespace(layer_names=["a", "b"], metadata_builders=[builder])],
        ]
    )
    assert builder.pruner is selection.pruner and other.pruner is None
    [(block_size, strides)] = told
    assert block_size == 16
    assert strides() == (8, 1, 2)
    # vLLM allocates the cache afterwards, and after profiling once more.
    layers["a"].kv_cache = torch.zeros(3, 2, 4, 8)
    assert strides() == (8, 4, 1)


# Making the parts


def facts(layers: int, kv_heads: int) -> ModelFacts:
    return ModelFacts(
        architecture="LlamaForCausalLM",
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        hidden_size=512,
        vocab_size=1000,
    )


def prepared(
    monkeypatch,
    layers: tuple[int | None, ...],
    device=CPU,
    size=None,
    heads=None,
    kv_heads=(KV_HEADS, KV_HEADS),
    ranks=1,
    **options,
) -> Selection:
    """The selection of a target with a layer map and a draft of five layers, or of a size
    (requests, longest, draft layers, draft heads); kv_heads: those of target and draft on this rank, heads: a head
    map."""
    requests, longest, draft_layers, draft_heads = size or (REQUESTS, LONGEST, 5, DRAFT_HEADS)
    target = {f"model.layers.{i}": kv_heads[0] for i in range(len(layers))}
    draft = {f"draft_model.model.layers.{i}": kv_heads[1] for i in range(draft_layers)}
    # vLLM lists layers in the order in which they were made; names of two digits would sort wrongly.
    made = {
        name: SimpleNamespace(impl=SimpleNamespace(num_heads=draft_heads, num_kv_heads=count, head_size=64))
        for name, count in reversed({**target, **draft}.items())
    }
    found = LayerMap(
        schema_=SCHEMA,
        method="specattn" if heads is None else "sts",
        calibrated=True,
        target=facts(len(layers), kv_heads[0] * ranks),
        draft=facts(draft_layers, kv_heads[1] * ranks),
        layers=layers,
        heads=heads,
    )
    monkeypatch.setattr(wiring, "get_layers_from_vllm_config", lambda config, base: made)
    monkeypatch.setattr(wiring, "resolve_layer_map", lambda config, options: found)
    return wiring.prepare(
        SimpleNamespace(
            vllm_config=None,
            options=SpecAttnOptions.parse({"method": "specattn", **options}),
            draft_attn_layer_names=set(draft),
            max_num_reqs=requests,
            max_model_len=longest,
            num_speculative_steps=STEPS,
            operations=executors.resolve("torch", CPU),
            counters=Counters(CPU),
            crossover_tokens=0,
            device=device,
        )
    )


def layer(i: int) -> str:
    return f"draft_model.model.layers.{i}"


@pytest.mark.parametrize("target, draft, heads", [(32, 16, 32), (36, 28, 16)], ids=["Llama-8B/1B", "Qwen3-8B/0.6B"])
def test_64_requests_of_128k_take_less_than_3_gb(target, draft, heads, monkeypatch):
    layers = tuple(i * draft // target for i in range(target))
    meta, size = torch.device("meta"), (64, 131072, draft, heads)
    made = prepared(monkeypatch, layers, meta, size)
    assert 1e9 < sum(made.nbytes.values()) < 3e9
    # Everything that is there is counted.
    owned = [made.tables, made.store.bits, made.store.prefix_lens, made.capture.scores, made.capture.ranking._mass]
    assert sum(made.nbytes.values()) >= sum(tensor.nbytes for tensor in owned)


@pytest.mark.parametrize(("requests", "warned"), [(1024, True), (64, False)])
def test_buffers_that_take_much_from_the_cache_are_named_with_the_remedy(requests, warned, monkeypatch):
    """vLLM's own default on a large GPU is 1024 requests."""
    lines = []
    monkeypatch.setattr(announcing.logger, "warning", lambda text, *values: lines.append(text % values))
    prepared(monkeypatch, (None, 0, 1), torch.device("meta"), (requests, 131072, 16, 32))
    found = [line for line in lines if "GiB from the KV cache" in line]
    assert len(found) == warned
    if warned:
        assert "max_num_seqs = 1024 requests of max_model_len = 131072 tokens: lower either" in found[0]


def test_the_draft_layers_of_the_map_choose_for_the_target(monkeypatch):
    made = prepared(monkeypatch, (None, 1, 1, 3, None, 1))
    assert made.capture.layer_sources == {layer(1): 0, layer(3): 1}
    assert made.pruner.layer_sources == {
        "model.layers.1": 0,
        "model.layers.2": 0,
        "model.layers.3": 1,
        "model.layers.5": 0,
    }
    assert (made.pruner.num_layers, made.pruner.num_kv_heads, made.pruner.max_query_len) == (6, KV_HEADS, STEPS + 1)
    assert made.pruner.store is made.store
    assert made.store.bits.shape[:3] == (2, REQUESTS + 1, 1)
    assert made.tables.shape == (2, REQUESTS, 1, ROW)


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ((0, 2), {}),
        ((0, 2, None), {"method": "sts", "kv_heads": (4, 2)}),
        ((0, 2), {"combine": "union"}),
    ],
)
def test_the_size_that_is_checked_is_that_of_all_buffers(monkeypatch, layers, options):
    checked = []
    monkeypatch.setattr(wiring, "refuse_if_too_large", lambda nbytes, *others: checked.append(nbytes))
    made = prepared(monkeypatch, layers, **options)
    [sizes] = checked
    assert sizes == made.nbytes
    storages = {}
    capture = made.capture
    for part in (made, capture, capture.ranking, made.store, made.pruner):
        for value in vars(part).values():
            if isinstance(value, torch.Tensor):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    # But for a few bytes that no number of requests changes.
    assert 0 <= sum(storages.values()) - sum(made.nbytes.values()) <= 64


def test_a_selection_that_is_too_large_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, GIB))
    # No CUDA device here: had anything been allocated on it, that would be the error.
    with pytest.raises(ValueError, match="lower --max-num-seqs or --max-model-len"):
        prepared(monkeypatch, (0, 2), device=torch.device("cuda"))


# Selections per head


def maps_of(made: Selection) -> list[tuple[int, list[int]]]:
    return [*zip(made.pruner.maps.sources.tolist(), made.pruner.maps.groups.tolist(), strict=True)]


def test_each_target_layer_reads_tables_of_its_own_heads(monkeypatch):
    heads = ((1, 0), None, (0, 0), (1, 0), (1, 1))
    made = prepared(monkeypatch, (3, None, 1, 1, 3), method="sts", heads=heads)
    assert made.capture.layer_sources == {layer(1): 0, layer(3): 1}
    assert made.pruner.layer_sources == {f"model.layers.{j}": t for t, j in enumerate((0, 2, 3, 4))}
    assert maps_of(made) == [(1, [1, 0]), (0, [0, 0]), (0, [1, 0]), (1, [1, 1])]
    assert made.store.bits.shape[:3] == (2, REQUESTS + 1, KV_HEADS)
    assert made.tables.shape == (4, REQUESTS, KV_HEADS, ROW)
    assert made.capture.ranking.groups == KV_HEADS


def test_layers_that_are_mapped_alike_share_a_table(monkeypatch):
    made = prepared(monkeypatch, (0, 0, None, 1, 1), method="sts")
    assert made.pruner.layer_sources == {f"model.layers.{j}": t for j, t in ((0, 0), (1, 0), (3, 1), (4, 1))}
    assert maps_of(made) == [(0, [0, 1]), (1, [0, 1])]
    assert made.pruner._layers_of.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("kv_heads", "pairs"), [((4, 2), [0, 0, 1, 1]), ((2, 4), [0, 2]), ((3, 2), [0, 0, 1]), ((4, 1), [0, 0, 0, 0])]
)
def test_without_a_head_map_heads_are_paired_by_proportion(monkeypatch, kv_heads, pairs):
    """Bits are those of the draft's KV heads, tables those of the target's."""
    lines = []
    monkeypatch.setattr(announcing.logger, "warning", lambda text, *values: lines.append(text % values))
    made = prepared(monkeypatch, (None, 0), method="sts", kv_heads=kv_heads)
    assert maps_of(made) == [(0, pairs)]
    assert made.store.bits.shape[2] == kv_heads[1]
    assert made.tables.shape[2] == kv_heads[0]
    assert any("paired by proportion, which is not calibrated" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "named", "method"),
    [
        ({}, "{shipped}", "specattn"),
        ({"dense_layers": (3,)}, "{shipped}", "specattn"),
        ({"method": "sts"}, "{shipped}", "sts"),
        ({"layer_map": "uniform"}, "uniform", "specattn"),
        ({"layer_map": "my.json"}, "my.json", "specattn"),
    ],
    ids=str,
)
def test_a_map_that_is_not_calibrated_is_warned_of_with_the_command_that_makes_a_better_one(
    monkeypatch, options, named, method
):
    lines = []
    monkeypatch.setattr(announcing.logger, "warning", lambda text, *values: lines.append(text % values))
    model, draft = SimpleNamespace(model="org/big"), SimpleNamespace(model="org/small")
    config = SimpleNamespace(model_config=model, speculative_config=SimpleNamespace(draft_model_config=draft))
    speculator = SimpleNamespace(vllm_config=config, crossover_tokens=0)
    monkeypatch.setattr(announcing, "announce_buffers", lambda speculator, nbytes: None)
    options = SpecAttnOptions.parse({"method": "specattn"} | options)
    shipped = layer_map.shipped()["qwen3-8b-qwen3-0.6b"]
    found = layer_map.read(shipped)
    found = layer_map.resolve(options.layer_map and "uniform", found.target, found.draft).with_dense((3,))
    announcing.announce(options, found, "by all", speculator, {"mass": 1})
    [line] = [line for line in lines if "specattn calibrate" in line]
    assert f"layer map '{named.format(shipped=shipped)}' is uniform, not calibrated for this pair" in line
    assert (
        f"specattn calibrate --target org/big --draft org/small --method {method} --text FILES --out map.json" in line
    )
    lines.clear()
    announcing.announce(options, uniform(facts(4, 2), facts(2, 2)), "by all", speculator, {"mass": 1})
    assert any(f"layer map '{options.layer_map or 'uniform'}' is uniform" in line for line in lines)
    lines.clear()
    prepared(monkeypatch, (None, 0))
    assert not any("specattn calibrate" in line for line in lines)


def test_a_head_map_needs_no_warning(monkeypatch):
    lines = []
    monkeypatch.setattr(announcing.logger, "warning", lambda text, *values: lines.append(text % values))
    prepared(monkeypatch, (None, 0), method="sts", heads=(None, (1, 1)))
    assert [line for line in lines if "APPROXIMATE" not in line] == []


def test_a_rank_has_the_map_of_its_own_heads(monkeypatch):
    monkeypatch.setattr(maps, "get_tensor_model_parallel_rank", lambda: 1)
    made = prepared(monkeypatch, (0,), method="sts", heads=((0, 1, 3, 2),), kv_heads=(2, 2), ranks=2)
    assert maps_of(made) == [(0, [1, 0])]


def test_page_tables_per_head_are_counted(monkeypatch):
    """Layers x requests x heads x tokens: for 16 requests of 32k, Llama 8B with 1B, 31 mapped layers."""
    layers = (None, *(j // 2 for j in range(1, 32)))
    heads = (None, *(tuple((h + j) % 8 for h in range(8)) for j in range(1, 32)))
    size = (16, 32768, 16, 32)
    made = prepared(monkeypatch, layers, torch.device("meta"), size, heads=heads, kv_heads=(8, 8), method="sts")
    assert made.nbytes["page tables"] == pytest.approx(4 * 31 * 16 * 8 * 32768, rel=1e-3)
    assert made.nbytes["mass"] == pytest.approx(4 * 16 * 16 * 8 * 32768, rel=0.05)

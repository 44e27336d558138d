"""What the doctor says of memory is what an engine takes, and its own generation works."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine


def test_buffers_are_those_of_an_engine(engine):
    from specattn_vllm.doctor.sizes import sizes
    from specattn_vllm.options import SpecAttnOptions

    llm = engine({"method": "sketch", "draft_ratio": 0.3}, max_num_seqs=3, max_model_len=1500)
    config = llm.llm_engine.vllm_config
    found = sizes(config, SpecAttnOptions.from_vllm(config))
    [runner] = llm.llm_engine.collective_rpc(lambda worker: [worker.model_runner])[0]
    parts = (runner.specattn_chooser.nbytes, runner.speculator.selection.nbytes)
    assert found["buffers"] == {what: sum(part[what] for part in parts) for what in parts[0]}
    assert found["max_num_seqs"] == 3 and found["max_model_len"] == 1500
    specs = runner.kv_cache_config.kv_cache_groups[0]
    per_block = specs.kv_cache_spec.page_size_bytes * len(specs.layer_names)
    assert found["kv_per_token"] == per_block / specs.kv_cache_spec.block_size
    assert 0 < found["sketch_share"] < 0.2


def test_the_states_of_a_hybrid_are_counted_before_there_is_an_engine(family, engine):
    from specattn_vllm.doctor.probes import ask
    from specattn_vllm.doctor.sizes import sizes
    from specattn_vllm.options import SpecAttnOptions

    target = family("nemotron-h")
    arguments = ("--dtype", "float32", "--max-model-len", "512", "--no-enable-prefix-caching", "--skip-tokenizer-init")
    before = ask("config", target, *arguments)
    llm = engine(
        {"method": "sketch"},
        target=target,
        max_model_len=512,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        speculative_config=None,
    )
    config = llm.llm_engine.vllm_config
    after = sizes(config, SpecAttnOptions.from_vllm(config))
    what = ("kv_per_token", "kv_in_states", "stateful_layers", "weights")
    assert {name: before.get(name) for name in what} == {name: after[name] for name in what}, before


def test_the_demo_pair_generates(demo_pair):
    from specattn_vllm.doctor.probes import ask

    assert "the demo pair gave 8 tokens, and its worker read" in ask("generate", *demo_pair)["says"]


def test_what_a_server_would_refuse_is_refused(demo_pair):
    from specattn_vllm.doctor.probes import ask

    target, draft = demo_pair
    good = (target, "--speculative-model", draft, "--num-speculative-tokens", "4", "--dtype", "float32")
    found = ask("config", *good, "--port", "8000", "--api-key", "x")  # of the server too
    assert "can be served: method sketch (approximate), ratio=0.125, drafter: draft_model" in found["says"]
    assert found["room"] > 2**30 and found["weights"] > 10**6
    refused = ask("config", *good, "--pipeline-parallel-size", "2")
    assert "pipeline_parallel_size = 2" in refused["error"]
    assert "--no-such-option" in ask("config", *good, "--no-such-option", "2")["error"]
    other = ask("config", target, "--attention-backend", "CPU_ATTN", "--dtype", "float32")
    assert "CPU_ATTN, so the plugin does nothing" in other["error"]
    assert other["remedy"] == "give --attention-backend specattn in its place"

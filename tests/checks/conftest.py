"""Start-up checks: each thing that cannot be served is refused with its reason and a remedy, before a model loads."""

from __future__ import annotations

import json

import pytest

HEADER = "--attention-backend specattn cannot serve this:"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Configurations of tiny models, by name; there is nothing to load, because nothing gets that far."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    from specattn_vllm import plugin

    plugin.register()
    folder = tmp_path_factory.mktemp("models")
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "dtype": "float32",
    }
    # All with Llama's architecture: vLLM inspects each one's code in a process of its own, which takes long.
    made = {
        "target": LlamaConfig(**shape),
        "draft": LlamaConfig(**shape | {"num_hidden_layers": 2}),
        "narrow": LlamaConfig(**shape | {"head_dim": 32}),
        "short": LlamaConfig(**shape | {"num_hidden_layers": 2, "max_position_embeddings": 64}),
        "alternating": Qwen2Config(
            **shape,
            use_sliding_window=True,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "windowed": MistralConfig(**shape, sliding_window=64),
        "windowed-narrow": MistralConfig(**shape | {"head_dim": 32}, sliding_window=64),
        # Qwen2 configurations name a window that is switched off.
        "window-unused": Qwen2Config(**shape, sliding_window=64, use_sliding_window=False),
    }
    for name, config in made.items():
        config.save_pretrained(folder / name)
    # Written by hand, as old configurations are: no KV heads, no head size.
    bare = {k: v for k, v in shape.items() if k not in ("num_key_value_heads", "head_dim", "dtype")}
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text(json.dumps(bare | {"model_type": "llama"}))
    save_file({"lm_head.weight": torch.zeros(8)}, folder / "bare" / "model.safetensors")
    return {name: str(folder / name) for name in (*made, "bare")}


@pytest.fixture
def configure(models):
    """configure(...): vLLM's finished configuration of an engine, as a user's command makes it. A method that is not
    named is 'specattn', which asks most of a configuration; `bare`: nothing of ours but in `others`."""
    from vllm.engine.arg_utils import EngineArgs

    def make(
        target="target",
        draft="draft",
        options=None,
        backend="specattn",
        spec=None,
        others=None,
        bare=False,
        **arguments,
    ):
        ours = not bare and (options is not None or backend == "specattn")
        given = {"specattn": {"method": "specattn"} | (options or {})} if ours else {}
        if draft is not None:
            spec = {"model": models[draft], "num_speculative_tokens": 2} | (spec or {})
        return EngineArgs(
            model=models[target],
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            max_model_len=128,
            attention_backend=backend,
            additional_config=(others or {}) | given,
            speculative_config=spec,
            **arguments,
        ).create_engine_config()

    return make


@pytest.fixture
def reasons(configure):
    """reasons(...): the lines with which a configuration is refused."""
    from specattn_vllm.checks import UnsupportedError

    def refused(**arguments) -> list[str]:
        with pytest.raises(UnsupportedError) as caught:
            configure(**arguments)
        header, *lines = str(caught.value).splitlines()
        assert header == HEADER
        assert all(line.startswith("  ") for line in lines)
        return [line.strip() for line in lines]

    return refused


@pytest.fixture
def warnings(monkeypatch):
    """The warnings so far."""
    from specattn_vllm import checks

    given = []
    monkeypatch.setattr(checks.logger, "warning", lambda message, *args: given.append(message % args))
    return given

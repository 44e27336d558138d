"""Quantised weights: keys, values and queries are as before, so the plugin sees no difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

NEW_TOKENS = 16
OPTIONS = {"method": "sketch", "ratio": 0.2, "min_tokens": 40, "recent_tokens": 16, "crossover_tokens": 0}
KINDS = {"int": (127, torch.int8), "float": (448, torch.float8_e4m3fn)}
"""Of 8 bits: the largest number, and the type. vLLM's kernels for 4 bits on CPUs (AWQ, GPTQ) need AVX-512."""
ON_A_GPU = torch.cuda.is_available()
CLOSE = {"int": 0.2 if ON_A_GPU else 0.05, "float": 0.2 if ON_A_GPU else 0.1}
"""How far log-probabilities may be apart. Activations are rounded to 8 bits, and some fall just to the other side: to
which depends on the machine too. On GPUs, vLLM's products of 8 bits have results in 16 bits alone. What is not read
changes them by 0.7."""


def quantise(source: str, folder: Path, kind: str) -> str:
    """A model's linear layers in 8 bits, one scale for each row, activations rounded as they come: compressed-tensors'
    form of it."""
    shutil.copytree(source, folder)
    largest, dtype = KINDS[kind]
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().amax(1, keepdim=True) / largest
        scaled = weights[name] / scale
        weights[name] = (scaled.round() if kind == "int" else scaled).to(dtype)
        weights[f"{name}_scale"] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    number = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": number | {"strategy": "channel", "dynamic": False},
        "input_activations": number | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_8_bits(kind, family, engine, counts, sketch_audit, answers, same, tmp_path):
    generator = torch.Generator().manual_seed(0)
    prompts = [{"prompt_token_ids": torch.randint(2, 512, (n,), generator=generator).tolist()} for n in (9, 127, 260)]
    arguments = {"skip_tokenizer_init": True, "max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 4}
    arguments |= {"target": quantise(family("qwen3"), tmp_path / kind, kind)}
    arguments |= {"speculative_config": None, "dtype": "bfloat16" if ON_A_GPU else "float32"}
    plain = answers(engine(None, **arguments), prompts, NEW_TOKENS)
    llm = engine(OPTIONS, **arguments)
    exact = answers(llm, prompts, NEW_TOKENS, exact=True)
    assert all(map(same, plain, exact, [CLOSE[kind]] * len(plain)))
    assert sketch_audit.pruned == 0
    sparse = answers(llm, prompts, NEW_TOKENS)
    seen = counts(llm)
    assert sketch_audit.pruned > 20 and 0 < seen.sparse_rows < seen.verify_rows
    assert not all(map(same, plain, sparse, [CLOSE[kind]] * len(plain)))

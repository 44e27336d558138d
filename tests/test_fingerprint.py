"""What a model is: facts from its configuration, and a digest sampled from its weights."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from specattn_vllm.fingerprint import facts_from_config, fingerprint, weights_digest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_size": 512,
    "vocab_size": 99,
}


@pytest.mark.parametrize("kind", [dict, lambda config: SimpleNamespace(**config)], ids=["dict", "object"])
@pytest.mark.parametrize(
    ("change", "fact", "value"),
    [
        ({}, "head_dim", 128),
        ({"head_dim": None}, "head_dim", 64),
        ("head_dim", "head_dim", 64),
        ({}, "num_key_value_heads", 2),
        ({"num_key_value_heads": None}, "num_key_value_heads", 8),
        ("num_key_value_heads", "num_key_value_heads", 8),
        ("architectures", "architecture", "unknown"),
        ({"architectures": None}, "architecture", "unknown"),
        ({}, "architecture", "LlamaForCausalLM"),
        ({}, "weights", None),
    ],
)
def test_facts_of_a_config(kind, change, fact, value):
    """`change`: keys to set, or the key that is missing."""
    config = {k: v for k, v in CONFIG.items() if k != change} | (change if isinstance(change, dict) else {})
    found = facts_from_config(kind(config))
    assert getattr(found, fact) == value
    others = {"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 512, "vocab_size": 99}
    assert others.items() <= found.model_dump().items()


def test_a_fingerprint_is_the_facts_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = fingerprint(tmp_path)
    assert found == facts_from_config(CONFIG, tmp_path).model_dump()
    assert found["weights"] == weights_digest(tmp_path) is not None
    assert fingerprint(str(tmp_path)) == found


def test_no_weight_files_no_digest(tmp_path):
    assert weights_digest(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) is None


def test_the_digest_depends_on_the_weights_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    before = weights_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) == before


# 16 samples of 4 KiB: a small file is read whole, a large one where sample i starts, at size * i / 16.
@pytest.mark.parametrize(
    ("size", "place"), [(5, 4), (1000, 999), (2**16, 2**16 - 1), *((2**20, 2**16 * i) for i in range(16))]
)
def test_the_digest_sees_a_changed_byte(tmp_path, size, place):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    before = weights_digest(tmp_path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\x01")
    assert weights_digest(tmp_path) != before


def test_the_digest_sees_length_name_and_every_file(tmp_path):
    digests = []
    for files in ({"a": 100}, {"a": 101}, {"b": 100}, {"a": 100, "b": 0}, {"a": 50, "b": 50}):
        folder = tmp_path / str(len(digests))
        folder.mkdir()
        for name, size in files.items():
            (folder / f"{name}.safetensors").write_bytes(bytes(size))
        digests.append(weights_digest(folder))
    assert len(set(digests)) == len(digests)

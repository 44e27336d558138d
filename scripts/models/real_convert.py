"""A GGUF file of a Llama as a folder that vLLM and transformers load: bfloat16 weights, tokenizer, chat template.

transformers reads GGUF files too. It is passed over because it asks for `accelerate` on top, fails beside some
installations of mistral_common, and drops how the file says that text is cut before the tokenizer's merges; its weights
are the same, bit for bit.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch
from refusal import Refused
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

# GGUF's names and ours. Those of a layer stand behind `blk.N.` there and behind `model.layers.N.` here.
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

The weights of `{file}`, written out in bfloat16 by `scripts/real_model` of specattn-vllm. The file holds them quantised
(GGUF, {types}); this is the model at that quality, not its authors' bfloat16 weights.

Model: {organization}, {licence}. The hashes and the versions that converted it are in `conversion.json`.
"""


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values in the order of the names.

    Not over the file: its header and the order in it are the writing library's choice, and may change with its version.
    """
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}\n".encode())
        found.update(weights[name].contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def config_of(fields: dict) -> LlamaConfig:
    def of_model(key, *default):
        value = fields.get(f"llama.{key}", *default)
        if value is None:
            raise Refused(f"the GGUF file does not say llama.{key}: it cannot be converted")
        return value

    if fields["general.architecture"] != "llama":
        raise Refused(f"only Llama models are converted here, and this is a {fields['general.architecture']}")
    hidden, heads = of_model("embedding_length"), of_model("attention.head_count")
    eps = of_model("attention.layer_norm_rms_epsilon")
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        num_hidden_layers=of_model("block_count"),
        intermediate_size=of_model("feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=of_model("attention.head_count_kv"),
        head_dim=of_model("rope.dimension_count", hidden // heads),
        max_position_embeddings=of_model("context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": of_model("rope.freq_base")},
        rms_norm_eps=float(f"{eps:.6g}"),  # kept in float32 there: 1e-05 would come out as 9.999999747378752e-06
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def our_name(name: str) -> str:
    stem, dot, kind = name.removeprefix("blk.").rpartition(".")
    layer, _, part = stem.partition(".")
    if name.startswith("blk.") and part in OF_A_LAYER:
        return f"model.layers.{layer}.{OF_A_LAYER[part]}{dot}{kind}"
    if stem in WHOLE:
        return f"{WHOLE[stem]}{dot}{kind}"
    raise Refused(f"the GGUF file has a tensor {name}, which a plain Llama has not")


def rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from GGUF's order, where the two numbers that turn together are neighbours, to halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def weights_of(tensors, config: LlamaConfig) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    found = {}
    for tensor in tensors:
        # float32 first: rounded once, from what the quantised values stand for.
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        name = our_name(tensor.name)
        if ".q_proj." in name or ".k_proj." in name:
            weight = rotary_halves(
                weight, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            )
        found[name] = weight.to(torch.bfloat16).contiguous()
    config.tie_word_embeddings = "lm_head.weight" not in found
    return found


def tokenizer_of(fields: dict, positions: int) -> PreTrainedTokenizerFast:
    model, cut = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if (model, cut) != ("gpt2", "smollm"):
        raise Refused(f"tokenizers of kind gpt2, cut as smollm, are converted here; this one is {model}, {cut}")
    tokens = fields["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
        **{f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in named.items()},
    )
    fast.chat_template = fields["tokenizer.chat_template"]
    return fast


def check_loads(folder: Path, tokenizer):
    """A tokenizer that loads differently from how it was saved must stop the run now."""
    probe = "<|im_start|>user\ndef f(x):\n    return 20 * x  # caf\u00e9 2024<|im_end|>\n"
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids, wanted = again(probe).input_ids, tokenizer(probe).input_ids
    if ids != wanted or again.decode(ids) != probe or again.chat_template != tokenizer.chat_template:
        raise Refused(
            f"the tokenizer in {folder} does not load as it was saved (transformers "
            f"{version('transformers')}): use the one that scripts/lib/setup.sh installs"
        )


def convert(gguf: Path, folder: Path) -> dict:
    """Writes `folder`; returns what is worth recording, with the digest of the weights."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = config_of(fields)
    weights = weights_of(reader.tensors, config)
    tokenizer = tokenizer_of(fields, config.max_position_embeddings)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone
    config.save_pretrained(folder)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # the chat template inside tokenizer_config.json
    check_loads(folder, tokenizer)
    types = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    card = CARD.format(
        name=gguf.name.split(".")[0],
        file=gguf.name,
        types=", ".join(types),
        organization=fields.get("general.organization", "unknown"),
        licence=fields.get("general.license", "licence unknown"),
    )
    (folder / "README.md").write_text(card)
    packages = ("gguf", "numpy", "safetensors", "tokenizers", "torch", "transformers")
    return {
        "weights_sha256": digest_of(weights),
        "tensor_types": types,
        "versions": {name: version(name) for name in packages},
    }

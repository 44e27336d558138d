"""From GGUF to a folder: the same model, and a tokenizer that cuts text as the file says."""

import pytest
import torch
import transformers

OUTPUT = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_the_converted_model_computes_what_the_quantised_weights_stand_for(packed, target):
    """Rows of the rotary projections in another order, or another rope base, would show in every logit."""
    assert {path.name for path in target.iterdir()} == OUTPUT
    converted = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert converted.dtype == torch.bfloat16 and converted.config.architectures == ["LlamaForCausalLM"]
    assert converted.config.tie_word_embeddings and converted.config.rms_norm_eps == 1e-5
    original = transformers.LlamaForCausalLM(packed.model.config)
    original.load_state_dict(packed.model.state_dict())
    original = original.to(torch.bfloat16).float()  # both from the same rounded weights
    ids = torch.randint(0, original.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(converted.float()(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_tokenizer_cuts_each_digit_apart_and_knows_the_chat_template(target):
    """Two spaces before a digit are one token only where the digit was cut off before the merges."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(target, local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the  12").input_ids) == ["the", "\u0120\u0120", "1", "2"]
    talk = [{"role": "user", "content": "the"}]
    chat = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat).input_ids
    assert ids[0] == tokenizer.bos_token_id == 1 and ids.count(2) == 1 and tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids) == chat and tokenizer.model_max_length == 4096


def test_the_digest_is_of_values_not_of_the_file(script):
    digest_of = script("real_convert").digest_of
    one, two = torch.arange(6.0).view(2, 3), torch.ones(2)
    found = digest_of({"a": one, "b": two})
    assert found == digest_of({"b": two.clone(), "a": one.T.contiguous().T})  # order and strides are no values
    others = [{"a": one, "b": two + 1}, {"a": one.view(3, 2), "b": two}, {"c": one, "b": two}]
    assert len({found, *map(digest_of, others)}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "qwen2"}, "only Llama models are converted here, and this is a qwen2"),
        ({"llama.block_count": None}, r"does not say llama\.block_count"),
    ],
)
def test_another_model_is_refused(script, packed, change, message):
    fields = {name: field.contents() for name, field in script("gguf").GGUFReader(packed.gguf).fields.items()}
    with pytest.raises(SystemExit, match=message):
        script("real_convert").config_of(fields | change)


def test_unknown_tensors_and_tokenizers_are_refused(script):
    convert = script("real_convert")
    assert convert.our_name("blk.11.attn_q.weight") == "model.layers.11.self_attn.q_proj.weight"
    with pytest.raises(SystemExit, match=r"a tensor blk\.0\.attn_q_norm\.weight, which a plain Llama has not"):
        convert.our_name("blk.0.attn_q_norm.weight")
    with pytest.raises(SystemExit, match="this one is llama, default"):
        convert.tokenizer_of({"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}, 1)

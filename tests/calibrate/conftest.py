"""Tiny pairs with random weights, and `specattn calibrate` on one of them."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from specattn_vllm import cli  # noqa: E402
from specattn_vllm.calibrate import models  # noqa: E402

CONFIGS = {
    "LlamaForCausalLM": "LlamaConfig",
    "MistralForCausalLM": "MistralConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
}
SIZES = dict(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    bos_token_id=0,
    eos_token_id=1,
    initializer_range=0.3,
    max_position_embeddings=512,
)


def _model(folder: Path, layers: int, architecture: str = "LlamaForCausalLM", **changed) -> Path:
    torch.manual_seed(layers)
    config = getattr(transformers, CONFIGS[architecture])(num_hidden_layers=layers, **(SIZES | changed))
    if architecture == "MistralForCausalLM" and "sliding_window" not in changed:
        config.sliding_window = None
    getattr(transformers, architecture)(config).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path, special: str = "<|bos|>") -> None:
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(
        [],
        tokenizers.trainers.BpeTrainer(
            vocab_size=258,
            special_tokens=[special, "<|eos|>"],
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tok.post_processor = tokenizers.processors.TemplateProcessing(single=f"{special} $A", special_tokens=[(special, 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=special).save_pretrained(folder)


@pytest.fixture(scope="session")
def make_model():
    """make_model(folder, layers, architecture, **config): a saved model with random weights."""
    return _model


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(folder, special): of bytes, with one token before any text."""
    return _tokenizer


@pytest.fixture(scope="session")
def load():
    """load(folder): the model as a calibration has it."""
    return lambda folder: models.load(folder, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def eager():
    """eager(folder): the model as transformers runs it, whole attention matrices and all."""

    def load(folder: Path):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    return load


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders `target` and `draft`, and a file `text.txt` of 1,590 tokens."""
    root = tmp_path_factory.mktemp("pair")
    for name, layers in (("target", 3), ("draft", 2)):
        _tokenizer(_model(root / name, layers))
    (root / "text.txt").write_text("".join(f"def f_{i}():\n    return {i * 7}\n\n" for i in range(53)))
    return root


@pytest.fixture(scope="session")
def run(pair):
    """run(out, *more): a calibration of four windows of 256 tokens."""

    def calibrate(out: Path, *more: str) -> int:
        return cli.main(
            [
                "calibrate",
                "--target",
                str(pair / "target"),
                "--draft",
                str(pair / "draft"),
                "--text",
                str(pair / "text.txt"),
                "--window",
                "256",
                "--windows",
                "4",
                "--queries",
                "16",
                "--device",
                "cpu",
                "--out",
                str(out),
                *more,
            ]
        )

    return calibrate

"""A tokenizer for models with random weights, which have none: token 7 is the word t7, so n words are n tokens."""

from __future__ import annotations

import json
from pathlib import Path

FIRST = 16
"""The first ids of a vocabulary may have a meaning."""


def word(token: int) -> str:
    # vLLM refuses a prompt with more characters than so many of the longest word would have, and does not count the
    # space after each. Token 0 is in no prompt.
    return f"t{token}" if token else "t" + 15 * "0"


def write_tokenizer(folder: Path, vocab_size: int, max_length: int) -> None:
    """What `AutoTokenizer` loads, beside a config.json."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    made = Tokenizer(WordLevel({word(token): token for token in range(vocab_size)}, unk_token=word(0)))
    made.pre_tokenizer = WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": word(0), "model_max_length": max_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

"""The requests: files in the format of vLLM's custom dataset, the same for every server. Each round has its own: none
finds prompts of an earlier one in the prefix cache.

Models with random weights have no tokenizer; theirs has token 7 as the word t7, so n words are n tokens."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specattn_vllm.bench.serve.schema import Round
from specattn_vllm.bench.serve.traffic import mixed
from specattn_vllm.installed import UserError
from specattn_vllm.tools.outputs import write_whole

Make = Callable[[int, random.Random], str]
"""A prompt of so many tokens."""
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


def random_words(vocab_size: int) -> Make:
    def make(length: int, draw: random.Random) -> str:
        return " ".join(word(draw.randrange(FIRST, vocab_size)) for _ in range(length))

    return make


class Corpus:
    """Prompts cut from text, each at a place of its own; the text begins anew where it ends."""

    TRIES = 50

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._special = len(tokenizer("").input_ids)
        self._ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False).input_ids
        self._used: set[int] = set()

    def __call__(self, length: int, draw: random.Random) -> str:
        """With as many tokens as the server will count, those included that it adds itself."""
        if length > len(self._ids):
            raise UserError(
                f"--input-len: prompts of {length:,} tokens, and the text has {len(self._ids):,}: give more (--text)"
            )
        for _ in range(self.TRIES):
            start = draw.randrange(len(self._ids))
            if start not in self._used and (text := self._cut(start, length)) is not None:
                self._used.add(start)
                return text
        raise UserError(
            f"--text: no stretch of it was {length:,} tokens long once it was text again, in {self.TRIES} tries: give "
            "other text, or other lengths (--input-len)"
        )

    def _cut(self, start: int, length: int) -> str | None:
        """Text is tokenized otherwise where it is cut, so what is missing or too much is made up for."""
        size = length - self._special
        for _ in range(5):
            if size < 1:
                return None
            ids = (self._ids[start : start + size] + self._ids[: max(start + size - len(self._ids), 0)])[:size]
            text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found = len(self._tokenizer(text).input_ids)
            if found == length:
                return text
            size += length - found
        return None


def write_rounds(
    make: Make, lengths: Mapping[int, float], rounds: Mapping[str, int], output_tokens: int, seed: int, folder: Path
) -> tuple[list[Round], dict[str, str]]:
    """`rounds`: name -> number of requests. Also each file's SHA-256, by the round's name."""
    folder.mkdir(parents=True, exist_ok=True)
    made, digests = [], {}
    for name, count in rounds.items():
        draw = random.Random(f"{seed} {name}")
        lines = [
            json.dumps({"prompt": make(length, draw), "output_tokens": output_tokens}) + "\n"
            for length in mixed(lengths, count, draw)
        ]
        data = "".join(lines).encode()
        file = f"requests-{name}.jsonl"
        write_whole(folder / file, data)
        made.append(Round(rate=name, requests=count, file=file))
        digests[name] = hashlib.sha256(data).hexdigest()
    return made, digests

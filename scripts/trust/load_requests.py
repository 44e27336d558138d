"""The requests of a load: well-formed ones of many kinds, and malformed ones (scripts/trust/load.py sends them)."""

import json
import math
import random
from typing import Any, NamedTuple

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
EXACT = {"specattn": "exact"}

# With speculation vLLM refuses min_p and logit_bias, so none has them.
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "logprobs": 1},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 0.8, "repetition_penalty": 1.2},
    {"temperature": 1.0, "n": 2},
    {"temperature": 0.8, "structured_outputs": {"regex": "[a-z]{5}"}},
)


class Shape(NamedTuple):
    """How long requests may be, and how many are of each kind."""

    characters: int
    """Of the longest prompts; tokens, where texts are lists of token ids."""
    tokens: int
    shortest: int
    fresh: float = 1 / 3
    """Share of the prompts that begin at a place of their own; others begin where a text begins."""
    exact: float = 1 / 4
    """Share of those that ask for full attention. An eighth as many in all are always the same."""
    random_weights: bool = False
    """Such a model has no template for chats, and its words fit no grammar."""
    cut: float = 0.25
    """Share of the streams that the client cuts."""
    malformed: float = 0.1


class Request(NamedTuple):
    path: str
    body: bytes
    kind: str
    tokens: int = 0
    """Which it must get; where it may end earlier, at most."""
    all_tokens: bool = True
    stream: bool = False
    cut_after: float | None = None
    """Seconds."""

    @property
    def malformed(self) -> bool:
        return not self.tokens


def fixed(model: str, texts: list[Any], characters: int, tokens: int) -> list[Request]:
    """Greedy and exact: each gets the same tokens whenever it is asked."""
    asked = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "vllm_xargs": EXACT}
    asked["return_token_ids"] = True
    bodies = [
        asked | {"prompt": text[:length]} for text, length in zip(texts, (characters, characters // 3), strict=False)
    ]
    return [Request(COMPLETIONS, json.dumps(body).encode(), "fixed", tokens) for body in bodies]


def malformed(rng: random.Random, model: str, longest: int) -> Request:
    """One that a server has to refuse. longest: positions of the model."""
    good = {"model": model, "max_tokens": 4}
    xargs = rng.choice(
        [
            {"specattn": "exakt"},
            {"specattn": ["exact"]},
            {"specattn": {"ratio": 1}},
            {"specattn": True},
            {"specattn": 0.5},
            {"specatn": "exact"},
            {"specattn.ratio": 0.1},
            {"specattn_exact": "yes"},
            "specattn",
            ["specattn"],
        ]
    )
    wrong = rng.choice(
        [
            {"max_tokens": -4},
            {"max_tokens": "four"},
            {"temperature": "hot"},
            {"temperature": -1},
            {"top_p": 7},
            {"stream": "perhaps"},
            {"n": 0},
            {"stop": {"a": 1}},
            {"model": "another"},
            {"structured_outputs": {"regex": "("}},
        ]
    )
    said = {"messages": [{"role": "user", "content": "a"}]}
    kind, path, body = rng.choice(
        [
            ("xargs", COMPLETIONS, good | {"prompt": "a", "vllm_xargs": xargs}),
            ("xargs", CHAT, good | said | {"vllm_xargs": xargs}),
            ("types", COMPLETIONS, good | {"prompt": "a"} | wrong),
            ("types", CHAT, good | said | wrong),
            ("types", COMPLETIONS, good | {"prompt": {"a": 1}}),
            ("types", CHAT, good | {"messages": "hello"}),
            ("types", COMPLETIONS, good | {"prompt": [99_999_999]}),
            ("too long", COMPLETIONS, good | {"prompt": [5] * (longest + 1)}),
            ("too long", CHAT, good | {"messages": [{"role": "user", "content": "a b " * longest}]}),
        ]
    )
    text = json.dumps(body).encode()
    if rng.random() < 0.2:
        kind, text = "broken JSON", text[: rng.randrange(len(text))] or b"{"
    return Request(path, text, f"malformed: {kind}")


def well_formed(rng: random.Random, model: str, texts: list[Any], shape: Shape) -> Request:
    # Short ones are frequent and long ones are there, as in traffic. Prefixes of most are cached.
    length = int(math.exp(rng.uniform(math.log(shape.shortest), math.log(shape.characters))))
    text = rng.choice(texts)
    begin = rng.randrange(max(1, len(text) - length)) if rng.random() < shape.fresh else 0
    sampling = rng.choice(SAMPLING[:-1] if shape.random_weights else SAMPLING)
    tokens, stream, chat = rng.randint(1, shape.tokens), rng.random() < 0.5, rng.random() < 0.4
    chat &= not shape.random_weights
    whole = "structured_outputs" not in sampling and rng.random() < 0.7
    body = {"model": model, "max_tokens": tokens, "stream": stream, "seed": rng.randrange(1 << 30)} | sampling
    if whole:
        body["ignore_eos"] = True
    if stream:
        body["stream_options"] = {"include_usage": True}
    if rng.random() < shape.exact:
        body["vllm_xargs"] = EXACT
    if chat:
        body["messages"] = [{"role": "user", "content": text[begin : begin + length]}]
        if "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": 1}
    else:
        body["prompt"] = text[begin : begin + length]
    # From before the first token to about the last.
    cut = rng.expovariate(1 / 5) if stream and rng.random() < shape.cut else None
    kind = "chat" if chat else "completion"
    return Request(
        CHAT if chat else COMPLETIONS,
        json.dumps(body).encode(),
        f"{kind}, streamed" if stream else kind,
        tokens * body.get("n", 1),
        whole,
        stream,
        cut,
    )

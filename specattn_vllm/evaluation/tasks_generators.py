"""Prompts made of held-out source code, whose answers stand in them at a given depth.

They are for models of source code that follow no instructions, like the demo pair: each ends in the middle of something
that has been there before. Prompts are put together of token ids, so that what is repeated are the same tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from specattn_vllm.evaluation.tasks_schema import Sample
from specattn_vllm.installed import UserError

# Sizes at which the demo target, with all of its KV, is often right, but not always.
SHOWN, COPIED = 32, 12
CONSTANTS, DIGITS = 8, 6


class Haystack(NamedTuple):
    """Source code, as text and as token ids."""

    text: str
    start: list[int]
    """Ids that the model wants at the beginning of a prompt."""
    ids: list[int]
    """Of the text, without those."""
    spans: list[tuple[int, int]]
    """First character and the one past the last, of each id."""
    encode: Callable[[str], list[int]]
    """Ids of other text, without those at the beginning."""

    def line_ends(self, count: int) -> list[int]:
        """Places among the first `count` ids at which a line ends: what is put there begins with a line break."""
        return [i for i in range(1, count) if self.text[slice(*self.spans[i])].startswith("\n")] or [count]

    def around(self, needle: list[int], question: list[int], length: int, depth: float) -> list[int]:
        """A prompt of up to `length` ids: lines of code, the needle among them at that depth, and the question."""
        count = length - len(self.start) - len(needle) - len(question)
        if not 0 < count <= len(self.ids):
            raise UserError(f"a prompt of {length} tokens has no room for what is asked in it: make --lengths larger")
        ends = self.line_ends(count)
        at = min(ends, key=lambda place: abs(place - depth * count))
        return [*self.start, *self.ids[:at], *needle, *self.ids[at : ends[-1]], *question]


def haystack(text: str, tokenizer: Any) -> Haystack:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)

    def encode(more: str) -> list[int]:
        return tokenizer(more, add_special_tokens=False, verbose=False).input_ids

    return Haystack(text, tokenizer("").input_ids, found.input_ids, found.offset_mapping, encode)


def passkey(code: Haystack, length: int, depth: float, draw: random.Random) -> Sample:
    """A constant is assigned once, and assigned again at the end of the prompt, up to its value."""
    name, value = f"PASSKEY_{draw.randrange(10)}", draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)
    line = f"\n\n{name} = {value}"
    question, answer = _asked_again(code, line, f"\n\n{name} =")
    needle = code.encode(line + "\n")
    return _sample("passkey", length, depth, code.around(needle, question, length, depth), answer)


def key_value(code: Haystack, length: int, depth: float, draw: random.Random) -> Sample:
    """Eight constants are assigned, and one of them again at the end of the prompt, up to its value."""
    words = sorted(set(re.findall(r"\b[a-z]{5,}\b", code.text)))
    names = draw.sample(words, min(CONSTANTS, length // 32, len(words)))
    if not names:
        raise UserError(f"a prompt of {length} tokens has no room for what is asked in it: make --lengths larger")
    lines = {name: f"\n\n{name} = {draw.randrange(1000, 10000)}" for name in names}
    asked = draw.choice(names)
    question, answer = _asked_again(code, lines[asked], f"\n\n{asked} =")
    block = code.encode("".join(lines.values()) + "\n")
    return _sample("key_value", length, depth, code.around(block, question, length, depth), answer)


def copy(code: Haystack, length: int, depth: float, draw: random.Random) -> Sample:
    """A function stands in other code, and begins a second time at the end of the prompt."""
    # From behind what the prompt takes, where it stands already.
    rest = code.text[code.spans[min(length, len(code.spans) - 1)][0] :]
    functions = re.findall(r"\n *def \w+\(.*?(?=\n *(?:def|class|@)|\n\S)", rest, re.S)
    fitting = [ids for text in functions if SHOWN + COPIED <= len(ids := code.encode(text)) <= length // 4]
    if not fitting:
        raise UserError(
            f"task 'copy': one of the files has no function of {SHOWN + COPIED} tokens behind its first {length:,}"
        )
    function = draw.choice(fitting)
    prompt = code.around(function, function[:SHOWN], length, depth)
    return _sample("copy", length, depth, prompt, function[SHOWN : SHOWN + COPIED])


def identifier(code: Haystack, length: int, depth: float, draw: random.Random) -> Sample:
    """Code as it is, cut behind the first token of a name or word that has stood in it once, at about that depth. What
    begins alike makes it harder than copying."""
    room, found = length - len(code.start), []
    for spans in _names(code).values():
        for (before, _), (first, _), (second, end) in zip([(-1, -1), *spans], spans, spans[1:], strict=False):
            begin = second + 1 - room
            if before < begin <= first:
                found.append((abs((first - begin) / room - depth), begin, second, end))
    if not found:
        raise UserError(f"task 'identifier': no name stands twice in {length} tokens of one of the files")
    _, begin, second, end = draw.choice(sorted(found)[:5])
    prompt = [*code.start, *code.ids[begin : second + 1]]
    return _sample("identifier", length, depth, prompt, code.ids[second + 1 : end])


def _names(code: Haystack) -> dict[str, list[tuple[int, int]]]:
    """Where names of six or more characters and three or more tokens stand: first token, one past the last."""
    begins = {start: i for i, (start, _) in enumerate(code.spans)}
    ends = {end: i + 1 for i, (_, end) in enumerate(code.spans)}
    found: dict[str, list[tuple[int, int]]] = {}
    for match in re.finditer(r"[A-Za-z_]\w{5,}", code.text):
        # A space before it may be part of its first token.
        first = begins.get(match.start(), begins.get(match.start() - 1))
        end = ends.get(match.end())
        if first is not None and end is not None and end > first + 2:
            found.setdefault(match.group(), []).append((first, end))
    return found


def _asked_again(code: Haystack, whole: str, beginning: str) -> tuple[list[int], list[int]]:
    """Ids of the beginning, and of what is missing to the whole, cut behind the last token that both have."""
    ids, question = code.encode(whole), code.encode(beginning)
    same = next((i for i, (a, b) in enumerate(zip(ids, question, strict=False)) if a != b), len(question))
    return ids[:same], ids[same:]


def _sample(task: str, length: int, depth: float, prompt: list[int], answer: list[int]) -> Sample:
    return Sample(task=task, length=length, depth=depth, prompt=prompt, answers=[answer])


GENERATORS: dict[str, Callable[[Haystack, int, float, random.Random], Sample]] = {
    "passkey": passkey, "key_value": key_value, "copy": copy, "identifier": identifier,
}  # fmt: skip

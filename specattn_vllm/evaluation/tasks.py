"""The prompts that settings are compared on: made here, or a file's."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specattn_vllm.evaluation.tasks_generators import GENERATORS, Haystack, haystack
from specattn_vllm.evaluation.tasks_schema import Sample
from specattn_vllm.installed import UserError


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    answer: str | list[str]
    task: str = Field("file", min_length=1)
    length: int | None = None
    depth: float | None = None


def read_file(path: Path, tokenizer: Any) -> Iterator[Sample]:
    """One sample a line: {"prompt": ..., "answer": one text or a list of accepted ones}, and, to group by, "task",
    "length" and "depth". Errors name the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--file {path} is not text in UTF-8") from None
    if not any(line.strip() for line in lines):
        raise UserError(f'--file {path} is empty: give it lines of {{"prompt": ..., "answer": ...}}')
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = _Line.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"--file {path}, line {number}: {f'{place}: ' if place else ''}{first['msg']}") from None
        accepted = [line.answer] if isinstance(line.answer, str) else line.answer
        if not accepted or not all(accepted):
            raise UserError(f"--file {path}, line {number}: answer: is empty, so that any continuation begins with it")
        prompt = tokenizer(line.prompt, verbose=False).input_ids
        answers = [_answer_ids(tokenizer, line.prompt, prompt, answer) for answer in accepted]
        yield Sample(task=line.task, length=line.length, depth=line.depth, prompt=prompt, answers=answers)


def _answer_ids(tokenizer: Any, text: str, prompt: list[int], answer: str) -> list[int]:
    """As the tokens that follow the prompt's where both are read as one text; where the last token of the prompt would
    then be another, as a text of its own, since that is what the model is left with."""
    both = tokenizer(text + answer, verbose=False).input_ids
    if both[: len(prompt)] == prompt and len(both) > len(prompt):
        return both[len(prompt) :]
    return tokenizer(answer, add_special_tokens=False, verbose=False).input_ids


def generate(
    names: list[str], lengths: list[int], depths: list[float], count: int, source: Iterable[tuple[str, str]],
    tokenizer: Any, seed: int,
) -> list[Sample]:  # fmt: skip
    """`count` samples for each task, length and depth. The same arguments give the same samples."""
    longest = max(lengths)
    codes = haystacks(source, tokenizer, 2 * longest, count * len(depths))
    samples = []
    for name in names:
        for length in lengths:
            for i, depth in enumerate(depths):
                for n in range(count):
                    # Of its own, so that a list of tasks or lengths that is made longer leaves the others as they are.
                    draw = random.Random(f"{seed} {name} {length} {depth} {n}")
                    code = codes[(i * count + n) % len(codes)]
                    samples.append(GENERATORS[name](code, length, depth, draw))
    return samples


def haystacks(source: Iterable[tuple[str, str]], tokenizer: Any, tokens: int, most: int) -> list[Haystack]:
    """Up to `most` pieces of source code of at least that many tokens; short files are strung together."""
    found, text = [], ""
    for _, content in source:
        text += ("\n\n" if text else "") + content
        code = haystack(text, tokenizer)
        if len(code.ids) >= tokens:
            found.append(code)
            text = ""
        if len(found) == most:
            break
    if not found:
        raise UserError(f"the text has no {tokens:,} tokens, which prompts are cut out of: give more files (--text)")
    return found


def check_lengths(samples: list[Sample], positions: int | None, model: str, more: int) -> None:
    """Refuse what the model has no positions for; `more` is what a round of drafting takes beyond the answer."""
    if positions is None:
        return
    for number, sample in enumerate(samples, start=1):
        needed = len(sample.prompt) + sample.answer_tokens + more
        if needed > positions:
            raise UserError(
                f"prompt {number} (task {sample.task!r}) takes {needed:,} tokens, {len(sample.prompt):,} of its own, "
                f"{sample.answer_tokens} to answer and {more} for drafts; {model} has {positions:,} positions: shorten "
                "it, or leave it out"
            )


def write_file(samples: list[Sample], path: Path, tokenizer: Any) -> None:
    """The samples as lines that `read_file` takes, and other tools."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    lines = [
        sample.model_dump(include={"task", "length", "depth"})
        | {"prompt": text(sample.prompt), "answer": [text(answer) for answer in sample.answers]}
        for sample in samples
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def told(sample: Sample) -> dict[str, Any]:
    """What the report keeps of a sample."""
    ids = json.dumps([sample.prompt, sample.answers]).encode()
    return {
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "tokens": len(sample.prompt),
        "answer_tokens": sample.answer_tokens,
        "sha256": hashlib.sha256(ids).hexdigest(),
    }

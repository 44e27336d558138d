"""Conversations made of text: the user shows parts of documents and asks about them, and the assistant quotes them.

No person and no model wrote the turns. An answer can be right or wrong, since it is quoted, and many questions are
about what was shown thousands of tokens before: that is what a cache that is read in part has to serve.
"""

import random
import re

from real_text import CODE, File

PIECE = 900  # characters of a shown part, about
WORDS = 6


def pieces(file: File) -> list[str]:
    """The file in parts of whole paragraphs; very long paragraphs are left out."""
    found, part = [], ""
    for paragraph in re.split(r"\n\s*\n", file.text):
        paragraph = paragraph.rstrip().lstrip("\n")
        if len(part) + len(paragraph) > PIECE:
            found.append(part)
            part = ""
        if len(paragraph) <= 2 * PIECE:
            part += ("\n\n" if part else "") + paragraph
    return [p for p in [*found, part] if p.count("\n") >= 3 and len(p) >= PIECE / 4]


def quoted(text: str, kind: str) -> str:
    text = text.strip("\n")
    return f"```\n{text}\n```" if kind == CODE else text


def telling_lines(part: str) -> list[int]:
    """Lines that can be asked about: long enough to be told apart, each once in the part, and not the last."""
    lines = part.split("\n")
    return [i for i, line in enumerate(lines[:-1]) if len(line.split()) >= 4 and part.count(line.strip()) == 1]


class Conversation:
    def __init__(self, seed: str):
        self.choose = random.Random(seed)
        self.messages: list[dict] = []
        self.shown: list[tuple[File, str]] = []

    def ask(self, question: str, answer: str):
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def show(self, file: File, part: str):
        """A part with its end left out, which the assistant adds; or whole, with a question about one of its lines."""
        lines = part.split("\n")
        known = telling_lines(part)
        if not known or self.choose.random() < 0.5:
            cut = len(lines) * 2 // 3
            begin, rest = "\n".join(lines[:cut]), "\n".join(lines[cut:])
            self.ask(
                f"This is from {file.name}:\n\n{quoted(begin, file.kind)}\n\nHow does it go on?",
                quoted(rest, file.kind),
            )
        else:
            line = lines[self.choose.choice(known)].strip()
            self.ask(
                f"This is from {file.name}:\n\n{quoted(part, file.kind)}\n\nQuote the line that begins with "
                f'"{" ".join(line.split()[:3])}".',
                quoted(line, file.kind),
            )
        self.shown.append((file, part))

    def recall(self):
        """A question about any part shown so far: what follows a line of it, or the whole of it again."""
        file, part = self.choose.choice(self.shown)
        lines, known = part.split("\n"), telling_lines(part)
        if known and self.choose.random() < 0.7:
            at = self.choose.choice(known)
            self.ask(
                f'In {file.name}, what comes right after the line "{lines[at].strip()}"?',
                quoted("\n".join(lines[at + 1 : at + 5]), file.kind),
            )
        else:
            self.ask(
                f'Repeat the part of {file.name} that begins with "{" ".join(part.split()[:WORDS])}".',
                quoted(part, file.kind),
            )


def conversation(files: list[File], long_enough) -> list[dict]:
    """Messages over `files` in turn, until `long_enough(messages)` or the files are at their end."""
    talk = Conversation(seed=files[0].name)
    for file in files:
        for part in pieces(file):
            talk.show(file, part)
            if len(talk.shown) > 1 and talk.choose.random() < 0.6:
                talk.recall()
            if long_enough(talk.messages):
                return talk.messages
    return talk.messages

#!/usr/bin/env python3
"""Write the texts that the real model is evaluated on: prose, code and chats, held out of the training of its draft.

    .venv/bin/python scripts/models/real_corpus.py TEXTS           # TEXTS/prose, TEXTS/code, TEXTS/chat, and texts.json
    specattn eval methods --text TEXTS/chat/*.txt ...
    .venv/bin/python scripts/models/real_corpus.py OTHERS --training    # of what the draft was trained on
    specattn calibrate --text OTHERS/*/*.txt ...

The texts are found on the machine (real_text.py), so that another machine gives others: texts.json names the
files and their hashes. Each document has at least --tokens tokens of the model's tokenizer, and is of one package where
that has as much held-out text, else of several. Chats are made of such text by rule (real_chats.py).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there by itself under PYTHONSAFEPATH=1
from demo_corpus import digest
from real_chats import conversation
from real_model import default_folder
from real_text import CODE, HELD_OUT_ONE_IN, PROSE, File, default_roots, find, headed, training
from refusal import Refused
from transformers import AutoTokenizer

CHAT = "chat"
FROM_A_PACKAGE = 2  # documents of a kind, before others have had their turn: variety counts for more than size


def strung(files: list[File], enough: Callable) -> Iterator[list[File]]:
    group = []
    for file in files:
        group.append(file)
        if enough(group):
            yield group
            group = []


def grouped(files: list[File], enough: Callable) -> Iterator[list[File]]:
    """Files for one document each: of one package first, then of small packages strung together, then what is left.

    The order is that of a hash of the package's name: a limit on the number must not favour the start of the alphabet.
    """
    small, more = [], []
    files = sorted(files, key=lambda f: (digest(f.package), f.name))
    for _, package in groupby(files, key=lambda f: f.package):
        package = list(package)
        found = list(islice(strung(package, enough), FROM_A_PACKAGE))
        yield from found
        if found:
            more += package[sum(map(len, found)) :]
        else:
            small += package
    yield from strung(small, enough)
    yield from strung(more, enough)


def documents(files: list[File], tokenizer, tokens: int, count: int) -> Iterator[tuple[str, list[File], str]]:
    """(kind, what it was made of, text) of up to `count` documents of each kind."""

    def long_enough(text):  # characters first: a token of ordinary text has more than two
        return len(text) > 2 * tokens and len(tokenizer(text, verbose=False).input_ids) >= tokens

    def joined(group):
        return "".join(map(headed, group)).rstrip() + "\n"

    def rendered(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False)

    found = {}
    for kind in (PROSE, CODE):
        groups = grouped([f for f in files if f.kind == kind], lambda group: long_enough(joined(group)))
        found[kind] = list(islice(groups, 2 * count))
    for kind, groups in found.items():
        yield from ((kind, group, joined(group)) for group in groups[:count])
    # From the other end of the lists, so that chats repeat other documents only where there are few.
    sources, chats = [list(groups) for groups in found.values()], 0
    while any(sources) and chats < count:
        for source in filter(None, sources):
            group = source.pop()
            text = rendered(conversation(group, lambda messages: long_enough(rendered(messages))))
            if chats < count and long_enough(text):
                chats += 1
                yield CHAT, group, text


def write(out: Path, found, tokenizer) -> list[dict]:
    records, numbers = [], {}
    for kind, group, text in found:
        number = numbers[kind] = numbers.get(kind, -1) + 1
        stem = re.sub(r"[^A-Za-z0-9]+", "-", group[0].package.removesuffix(".py")).strip("-").lower()
        path = out / kind / f"{number:02d}-{stem}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        tokens = len(tokenizer(text, verbose=False).input_ids)
        sources = [{"file": f.name, "sha256": digest(f.text).hex()} for f in group]
        records.append(
            {
                "file": path.relative_to(out).as_posix(),
                "kind": kind,
                "tokens": tokens,
                "sha256": digest(text).hex(),
                "made_of": sources,
            }
        )
    return records


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, metavar="TEXTS", help="folder to write; it must be absent or empty")
    add("--model", type=Path, default=default_folder(), metavar="FOLDER", help="whose tokenizer [%(default)s]")
    add("--documents", type=int, default=16, metavar="N", help="of each kind, at most [%(default)s]")
    add("--tokens", type=int, default=8192, metavar="N", help="in each document, at least [%(default)s]")
    add("--roots", type=Path, nargs="+", metavar="FOLDER", help="where to look [Python's packages, manuals]")
    add("--training", action="store_true", help="of the text for training, to calibrate on; never evaluate on it")
    args = parser.parse_args(argv)
    if not (args.model / "tokenizer.json").is_file():
        parser.error(f"{args.model} holds no tokenizer: run scripts/real_model, or name a model with --model")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty: name another folder, or remove it; texts of two runs must not mix")

    found = find(args.roots or default_roots())
    files = training(found) if args.training else [f for f in found if f.held_out]
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    records = write(args.out, documents(files, tokenizer, args.tokens, args.documents), tokenizer)
    for kind in (PROSE, CODE, CHAT):
        sizes = [r["tokens"] for r in records if r["kind"] == kind]
        if not sizes:
            raise Refused(
                f"the {'training' if args.training else 'held-out'} text makes no {kind} of {args.tokens:,} tokens: "
                "name more --roots, or ask for fewer --tokens"
            )
        print(f"{kind}: {len(sizes)} documents of {min(sizes):,} to {max(sizes):,} tokens")
    about = {"model": args.model.name, "tokens": args.tokens, "held_out_one_in": HELD_OUT_ONE_IN}
    about |= {"training": args.training, "documents": records}
    (args.out / "texts.json").write_text(json.dumps(about, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()

"""What a draft of the real model learns from: text of the machine as token ids, and what is held out of it."""

import random
from itertools import groupby
from pathlib import PurePath

import numpy as np
from demo_corpus import encode
from real_chats import conversation
from real_text import CODE, PROSE, File, default_roots, find, headed, training
from refusal import Refused

END_OF_TEXT = "<|endoftext|>"  # SmolLM2's mark between documents; its <bos> and <eos> are those of a turn in a chat

PROSE_SHARE, MOST_REPEATS = 0.25, 4


def separator_of(tokenizer) -> int:
    return tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)


def by_folder(files: list[File], seed: int) -> list[list[File]]:
    """Documents: the files of one folder. The folders of a package follow each other, and packages are shuffled."""

    def place(file):
        return file.package, str(PurePath(file.name).parent)

    packages = [list(group) for _, group in groupby(sorted(files, key=place), key=lambda f: f.package)]
    random.Random(seed).shuffle(packages)  # a cap on the text must not favour the start of the alphabet
    return [list(folder) for package in packages for _, folder in groupby(package, key=place)]


def size_of(documents: list[list[File]]) -> int:
    return sum(len(file.text) for document in documents for file in document)


def capped(documents: list[list[File]], characters: float) -> list[list[File]]:
    found, size = [], 0
    for document in documents:
        if size >= characters:
            break
        found.append(document)
        size += sum(len(f.text) for f in document)
    return found


def chats(documents: list[list[File]], tokenizer, characters: float, longest: int) -> list[list[str]]:
    """Conversations over the documents, in their order, of at most about `longest` characters each."""
    found, size = [], 0
    for document in documents:
        if size >= characters:
            break
        messages = conversation(document, lambda talk: sum(len(m["content"]) for m in talk) >= longest)
        if messages:
            found.append([tokenizer.apply_chat_template(messages, tokenize=False)])
            size += len(found[-1][0])
    return found


def mixed(files: list[File], args, characters: float) -> dict[str, list[list[File]]]:
    """Documents by kind. A machine has much more code than prose, so prose is repeated up to its share."""
    kinds = {kind: by_folder([f for f in files if f.kind == kind], args.seed) for kind in (PROSE, CODE)}
    prose = capped(kinds[PROSE], PROSE_SHARE * characters)
    prose *= max(1, min(MOST_REPEATS, int(PROSE_SHARE * characters / max(size_of(prose), 1))))
    return {PROSE: prose, CODE: capped(kinds[CODE], characters - size_of(prose))}


def read(args, tokenizer) -> tuple[np.ndarray, dict[str, np.ndarray], dict]:
    """(training stream, held-out streams by kind, facts)."""
    files = find(args.roots or default_roots())
    held, learnt = [f for f in files if f.held_out], training(files)
    if not learnt or not held:
        raise Refused(
            f"found {len(learnt)} files to train on and {len(held)} held out: name folders with more text with --roots"
        )
    print(f"text: {len(files)} files, {len(learnt)} to train on, {len(held)} held out", flush=True)
    longest = 3 * args.context  # characters of a chat: a token of ordinary text has about three

    def stream(of: list[list[str]], label: str) -> np.ndarray:
        return encode(tokenizer, of, label, separator=separator_of(tokenizer))

    def documents(found: dict[str, list[list[File]]], talk: float) -> dict[str, list[list[str]]]:
        both = found[PROSE] + found[CODE]
        random.Random(args.seed).shuffle(both)
        plain = {kind: [[headed(f) for f in document] for document in of] for kind, of in found.items()}
        return plain | {"chat": chats(both, tokenizer, talk, longest)}

    whole = args.corpus_mb * 1e6
    learning = documents(mixed(learnt, args, whole * (1 - args.chat_share)), whole * args.chat_share)
    tokens = stream([document for of in learning.values() for document in of], "training text")
    enough = 4 * args.eval_windows * args.context * 4  # characters of each kind, for windows of several packages
    judged = {kind: capped(by_folder([f for f in held if f.kind == kind], args.seed), enough) for kind in (PROSE, CODE)}
    judged = {kind: stream(of, f"held-out {kind}") for kind, of in documents(judged, enough).items() if of}
    facts = {
        "found_files": len(files),
        "held_out_files": len(held),
        "files_to_train_on": len(learnt),
        "documents": {kind: len(of) for kind, of in learning.items()},
        "packages": sorted({f.package for f in learnt}),
        "training_tokens": len(tokens),
    }
    return tokens, {kind: found for kind, found in judged.items() if len(found) >= args.context}, facts

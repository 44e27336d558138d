"""Text and tokenizer of the demo pair: what the models train on, what is held out, and how both become token ids."""

import hashlib
import os
import random
import site
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from refusal import Refused
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BOS, EOS = "<|bos|>", "<|eos|>"
SKIP_DIRS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
TEST_DIRS = {"test", "tests", "idle_test"}


# ---- corpus ---------------------------------------------------------------------------------------------------


def python_files(root):
    """Every *.py under `root` in path order, without caches and nested package trees."""
    for folder, dirs, names in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in SKIP_DIRS)
        yield from (Path(folder, n) for n in sorted(names) if n.endswith(".py"))


def read_source(path):
    """The text of a file of 1 KB to 400 KB in valid UTF-8 with lines of ordinary length; None for anything else."""
    try:
        if not 1_000 <= path.stat().st_size <= 400_000:
            return None
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None
    # Very long lines mark tables and generated parsers, which teach a small model nothing.
    return None if len(text) / (text.count("\n") + 1) > 200 else text


def is_held_out_package(name):
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0


def digest(text):
    return hashlib.sha256(text.encode()).digest()


def long_lines(text):
    return [s for line in text.splitlines() if len(s := line.strip()) >= 20]


def site_dirs():
    paths = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [Path(p) for p in dict.fromkeys(map(os.path.realpath, paths)) if os.path.isdir(p)]


def collect_corpus(roots, seed=0, max_mb=600):
    """Training and held-out text.

    roots: directories whose children are packages (or single modules).
    Returns (training, held_out, facts). The first two are lists of documents; a document is the list of the files of
    one package directory in path order, each text headed by its path inside the package. Directories of one package
    follow each other, so that an 8k context holds related files and copying over long distances pays.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    names = {}  # top-level package name -> [(path, path inside the root)]
    for root in map(Path, roots):
        for path in python_files(root):
            rel = path.relative_to(root)
            names.setdefault(rel.parts[0].removesuffix(".py"), []).append((path, rel))
    order = sorted(names)
    random.Random(seed).shuffle(order)  # a cap on the text must not favour the start of the alphabet
    library = [(p, p.relative_to(stdlib)) for p in python_files(stdlib)]
    held_packages = [n for n in order if is_held_out_package(n)]

    with ThreadPoolExecutor(16) as pool:

        def texts(files):
            return [
                (rel, t)
                for (_, rel), t in zip(files, pool.map(read_source, (p for p, _ in files)), strict=True)
                if t is not None
            ]

        library_texts = texts(library)
        barred = {digest(t) for _, t in library_texts}
        library_lines = {line for _, t in library_texts for line in long_lines(t)}
        for name in held_packages:
            barred.update(digest(t) for _, t in texts(names[name]))

        training, used, seen, size = [], [], set(barred), 0
        dropped = {"same_as_held_out": 0, "mostly_standard_library": 0, "duplicate": 0}
        for name in (n for n in order if n not in set(held_packages)):
            folders = {}
            for rel, text in texts(names[name]):
                key = digest(text)
                if key in seen:
                    dropped["same_as_held_out" if key in barred else "duplicate"] += 1
                    continue
                # Packages carry edited copies of standard modules (back-ports), which no content hash finds.
                lines = long_lines(text)
                if lines and sum(line in library_lines for line in lines) > len(lines) / 2:
                    dropped["mostly_standard_library"] += 1
                    continue
                seen.add(key)
                size += len(text)
                folders.setdefault(rel.parent, []).append(f"# file: {rel.as_posix()}\n{text.rstrip()}\n\n")
            if folders:
                used.append(name)
                training.extend(folders.values())
            if size > max_mb * 1e6:
                break
    held = {}
    for rel, text in library_texts:
        if not TEST_DIRS & set(rel.parts):
            held.setdefault(rel.parent, []).append(f"# file: {rel.as_posix()}\n{text.rstrip()}\n\n")
    facts = {
        "packages": len(used),
        "package_names": sorted(used),
        "held_out_packages": sorted(held_packages),
        "files": sum(map(len, training)),
        "characters": size,
        "dropped_files": dropped,
        "held_out_files": sum(map(len, held.values())),
    }
    return training, list(held.values()), facts


# ---- tokenizer ------------------------------------------------------------------------------------------------


def train_tokenizer(documents, vocab, context, seed, sample_mb=60):
    """A byte-level BPE tokenizer that puts <|bos|> first, as every training context does."""
    files = [f for d in documents for f in d]
    random.Random(seed).shuffle(files)
    total, sample = 0, []
    for text in files:
        if (total := total + len(text)) > sample_mb * 1e6:
            break
        sample.append(text)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[BOS, EOS],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if tok.get_vocab_size() != vocab:
        raise Refused(f"the text gives {tok.get_vocab_size()} tokens, not {vocab}: more text or a smaller --vocab")
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=BOS, eos_token=EOS, model_max_length=context)
    # Not a chat model; the template only lets a chat endpoint answer with a continuation.
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def encode(tokenizer, documents, label, separator=None):
    """One stream of <|bos|> document <|eos|> ...

    separator: the id that a model marks the end of a document with, where that is all and no <|bos|> precedes it.
    """
    tok, kind = tokenizer.backend_tokenizer, np.uint16 if len(tokenizer) <= 65536 else np.uint32
    bos, eos = ([tokenizer.bos_token_id], [tokenizer.eos_token_id]) if separator is None else ([], [separator])
    flat = [(t, i == 0, i == len(d) - 1) for d in documents for i, t in enumerate(d)]
    parts, start = [], time.monotonic()
    for at in range(0, len(flat), 1024):  # bounded batches: an Encoding takes far more memory than its ids
        chunk = flat[at : at + 1024]
        found = tok.encode_batch_fast([t for t, _, _ in chunk], add_special_tokens=False)
        for (_, first, last), e in zip(chunk, found, strict=True):
            parts.append(np.array(bos * first + e.ids + eos * last, dtype=kind))
    stream = np.concatenate(parts)
    print(f"{label}: {len(stream) / 1e6:.1f}M tokens in {time.monotonic() - start:.0f} s", flush=True)
    return stream


def write_tokenizer(tokenizer, config, folder):
    """Save tokenizer and config, and read them back: a tokenizer that loads differently must stop the run now."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    probe = "def f(x):\n    return {'a': [x, 1.5]}  # caf\u00e9\n"
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = again(probe)["input_ids"]
    if ids != tokenizer(probe)["input_ids"] or again.decode(ids[1:]) != probe or ids[0] != config.bos_token_id:
        raise Refused(f"the tokenizer in {folder} does not load as it was saved")

"""Text that lies on a machine, for the real model: prose and code, and which files are held out of training.

A file is held out by the hash of its own content, so that every machine takes the same decision about the same file.
Nothing here is downloaded, and nothing of it is published: each file keeps its licence.
"""

import os
import re
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from demo_corpus import SKIP_DIRS, digest, long_lines, read_source, site_dirs

PROSE, CODE = "prose", "code"
SUFFIXES = {
    ".rst": PROSE,
    ".md": PROSE,
    ".txt": PROSE,
    ".py": CODE,
    ".c": CODE,
    ".h": CODE,
    ".cpp": CODE,
    ".hpp": CODE,
    ".cu": CODE,
    ".cuh": CODE,
}
SYSTEM = Path("/usr/share")  # manuals of what the system has installed
HELD_OUT_ONE_IN = 20


class File(NamedTuple):
    kind: str
    package: str  # the folder (or file) right below the root
    name: str  # its path below the root
    text: str

    @property
    def held_out(self) -> bool:
        return int.from_bytes(digest(self.text)) % HELD_OUT_ONE_IN == 0


def default_roots() -> list[Path]:
    return [p for p in (Path(sysconfig.get_path("stdlib")), *site_dirs(), SYSTEM) if p.is_dir()]


def kind_of(path: Path) -> str | None:
    return PROSE if path.name == "METADATA" else SUFFIXES.get(path.suffix)


def read(path: Path) -> str | None:
    """The text, or None for what is no prose or code in the ordinary sense: tables, lists of words, generated files."""
    text = read_source(path)
    if text is None:
        return None
    if path.name == "METADATA":
        text = text.partition("\n\n")[2]  # what a package says about itself stands behind the fields
    letters = sum(c.isalpha() or c.isspace() for c in text) / max(len(text), 1)
    if kind_of(path) == CODE:
        return text if letters >= 0.6 else None
    lines = [line for line in text.splitlines() if line.strip()]
    sentences = sum(len(re.findall(r"[^\W\d_]{2,}", line)) >= 5 for line in lines) / max(len(lines), 1)
    return text if len(text) >= 1_000 and letters >= 0.75 and sentences >= 0.5 else None


def find(roots) -> list[File]:
    """Every file of the two kinds below the roots, each content once, in path order."""
    found, seen = [], set()
    with ThreadPoolExecutor(8) as pool:
        for root in map(Path, roots):
            paths = []
            for folder, dirs, names in os.walk(root):
                dirs[:] = sorted(d for d in dirs if d not in SKIP_DIRS)
                paths += [p for p in (Path(folder, n) for n in sorted(names)) if kind_of(p)]
            for path, text in zip(paths, pool.map(read, paths), strict=True):
                if text is not None and (key := digest(text)) not in seen:
                    seen.add(key)
                    inside = path.relative_to(root)
                    package = "/".join(inside.parts[: 2 if inside.parts[0] == "doc" else 1])
                    found.append(File(kind_of(path), package, inside.as_posix(), text))
    return found


def training(files: list[File]) -> list[File]:
    """Without what is held out, and without edited copies of it: packages carry each other's files along.

    A copy is a file most of whose lines are held-out ones. Short files of nothing but boilerplate go with them.
    """
    barred = {hash(line) for file in files if file.held_out for line in long_lines(file.text)}
    kept = []
    for file in files:
        lines = long_lines(file.text)
        if not file.held_out and sum(hash(line) in barred for line in lines) <= len(lines) / 2:
            kept.append(file)
    return kept


def headed(file: File) -> str:
    """As it stands in a document: code says which file it is, as in the demo pair's corpus; prose begins by itself."""
    return (f"# file: {file.name}\n" if file.kind == CODE else "") + file.text.rstrip() + "\n\n"

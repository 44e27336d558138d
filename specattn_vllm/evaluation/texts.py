"""The documents that are evaluated on, as token ids."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from specattn_vllm.installed import UserError

HELD_OUT = """
argparse.py asyncio/base_events.py difflib.py email/_header_value_parser.py http/cookiejar.py inspect.py ipaddress.py
tarfile.py ast.py collections/__init__.py configparser.py dataclasses.py doctest.py enum.py http/client.py
logging/__init__.py mailbox.py optparse.py pickle.py shutil.py smtplib.py statistics.py subprocess.py threading.py
typing.py unittest/mock.py urllib/request.py xml/dom/minidom.py xml/etree/ElementTree.py zipfile.py
"""
"""Modules of Python's standard library, none of which the demo pair was trained on (its model cards): of many kinds,
and each longer than 9,000 of the demo pair's tokens."""


class Document(NamedTuple):
    name: str
    ids: list[int]

    @property
    def digest(self) -> str:
        """SHA-256 over the ids, four bytes each, the lowest first."""
        return hashlib.sha256(np.array(self.ids, dtype="<i4").tobytes()).hexdigest()


def held_out() -> Iterator[tuple[str, str]]:
    """Name and text of each module; later Pythons have made folders of some files, which are passed over."""
    folder = Path(sysconfig.get_path("stdlib"))
    for name in HELD_OUT.split():
        if (folder / name).is_file():
            yield name, (folder / name).read_text(encoding="utf-8")


def files(paths: list[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        try:
            yield path.name, path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--text {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"--text {path} is not text in UTF-8") from None


def documents(
    texts: Iterable[tuple[str, str]], tokenize: Callable[[str], list[int]], length: int, count: int
) -> list[Document]:
    """`count` documents of `length` tokens. Each begins with a file; files too short for one are strung together."""
    found, names, text = [], [], ""
    for name, content in texts:
        names.append(name)
        text += ("\n\n" if text else "") + content
        ids = tokenize(text)
        if len(ids) >= length:
            found.append(Document(" + ".join(names), ids[:length]))
            names, text = [], ""
        if len(found) == count:
            return found
    raise UserError(
        f"the text makes {len(found)} documents of {length:,} tokens, not --documents {count}: give more files, or ask "
        "for fewer or shorter ones (--documents, --context, --positions)"
    )

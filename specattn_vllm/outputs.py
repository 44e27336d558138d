"""Files that commands write: refused before anything is measured where they could not be. Standard library only."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def output_file(text: str) -> Path:
    """For argparse's `type`. Folders are not made: a slip in a path would leave them anywhere, and the figures with
    them."""
    path = Path(text).expanduser()
    folder = path.parent
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give a file in it, e.g. {path / 'results.json'}")
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        remedy = "give another" if folder.exists() else f"make it (mkdir -p {folder}), or give another"
        raise argparse.ArgumentTypeError(f"{text}: {folder}: {what}: {remedy}")
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: {folder} may not be written to: give another")
    return path

"""Arguments that several scripts take, and kinds of them, for argparse."""

import argparse
import json
from pathlib import Path


def model(text: str) -> Path:
    """The folder of a model. A command that was to name it and failed leaves nothing."""
    folder = Path(text)
    if not text or not (folder / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"'{text}' holds no model: run scripts/real_model, which prints a folder")
    return folder


def document(text: str) -> Path:
    """A text file."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"'{text}' is no file: scripts/models/real_corpus.py makes texts")
    return path


def add_model_and_texts(parser: argparse.ArgumentParser) -> None:
    """`--target` and `--text`, of scripts that decode documents with a real model."""
    told = "the model, e.g. what scripts/real_model prints"
    parser.add_argument("--target", type=model, required=True, metavar="FOLDER", help=told)
    told = "documents, one request each"
    parser.add_argument("--text", type=document, nargs="+", required=True, metavar="FILE", help=told)


def positive(text: str) -> int:
    """1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def positions(folder: Path) -> int:
    """How many tokens a model can have in its context."""
    return json.loads((folder / "config.json").read_text())["max_position_embeddings"]

"""The server of a load: scripts/serve, or random weights of a shape (scripts/trust/load.py starts it)."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from specattn_vllm.bench.jobs import ACCEPTANCE_LENGTH, DRAFT_TOKENS, speculation
from specattn_vllm.bench.serve.prompts import FIRST, write_tokenizer
from specattn_vllm.bench.worker import fill_in
from specattn_vllm.tools import models
from specattn_vllm.tools.engines import MODULE

ROOT = Path(__file__).resolve().parents[2]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""On a CPU: makes the C library give freed memory back at once. It keeps some by itself, in more and more pieces where
Triton's interpreter makes arrays of all sizes: that looks like a leak, and hides one."""
TEXTS = 2
"""Of a shape; prompts that begin where a text begins share blocks of the KV cache."""


def malloc() -> dict[str, str]:
    return {} if "TRITON_INTERPRET" not in os.environ else MALLOC


def started(command: Sequence[str], log: Path, **variables: str) -> tuple[subprocess.Popen, str]:
    """The server's first process, and its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    whole = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        into = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(whole, **into, env=os.environ | malloc() | variables, start_new_session=True)
    return process, f"http://127.0.0.1:{port}"


def of_real_weights(arguments: list[str], log: Path) -> tuple[subprocess.Popen, str]:
    venv = os.environ.get("SPECATTN_VENV", sys.prefix)
    return started([str(ROOT / "scripts/serve"), *arguments], log, SPECATTN_VENV=venv)


def of_shape(name: str, arguments: list[str], folder: Path, log: Path) -> tuple[subprocess.Popen, str]:
    """Random weights, with the shape's draft model. The drafts are accepted at random (vLLM's synthetic acceptance)."""
    shape = models.load_shape(name)
    folders = {role: str(path) for role, path in models.model_folders(shape, folder).items()}
    write_tokenizer(Path(folders["target"]), shape.vocab_size, shape.max_position)
    drafts = json.dumps(fill_in(speculation("draft", "draft", DRAFT_TOKENS, ACCEPTANCE_LENGTH), folders))
    command = [*MODULE, "vllm.entrypoints.cli.main", "serve", folders["target"], "--load-format", "dummy"]
    command += ["--speculative-config", drafts, "--attention-backend", "specattn"]
    return started([*command, *arguments], log)


def token_ids(name: str, length: int, seed: int) -> list[list[int]]:
    """Texts of so many tokens, drawn from a shape's vocabulary."""
    vocabulary, draw = range(FIRST, models.load_shape(name).vocab_size), random.Random(seed)
    return [draw.choices(vocabulary, k=length) for _ in range(TEXTS)]

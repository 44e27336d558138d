#!/usr/bin/env python3
"""Load on a real server: requests of many kinds, cut streams and malformed requests; then, whether anything is left.

    .venv/bin/python scripts/trust/load.py --out load.json --name demo -- --additional-config.specattn.method sketch
    .venv/bin/python scripts/trust/load.py --url http://127.0.0.1:8000 --minutes 1
    .venv/bin/python scripts/trust/load.py --shape llama-8b-1b --requests 2000 -- --num-gpu-blocks-override 15000

Without --url it starts a server: what stands behind `--` are arguments of scripts/serve, or with --shape, whose weights
are random, of `vllm serve`. Clients send one request after the other. Once a second the server's metrics and the memory
of its processes are read. At the end nothing may run, wait or hold a page of the KV cache; each request must have got
what it asked for, each malformed one an error of the client; and greedy exact requests must get the tokens that they
got before. Exit status 1 if one of these is not so. Tokens of random weights are counted only: there all tokens are
about as likely, and rounding decides. Ctrl-C ends it early, with a report.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import aiohttp
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there by itself under PYTHONSAFEPATH=1
import given
from load_client import Client, Wrong, growth, memory
from load_requests import Shape, fixed, malformed, well_formed
from load_server import malloc, of_real_weights, of_shape, token_ids
from refusal import Refused

from specattn_vllm.causes import of_log
from specattn_vllm.evaluation.texts import held_out
from specattn_vllm.tools.models import shape_names
from specattn_vllm.tools.provenance import provenance

SETTINGS = "shape", "minutes", "requests", "concurrency", "characters", "shortest", "fresh", "exact", "tokens", "seed"
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def why(log: str) -> str:
    """What a server's log says of its end."""
    return of_log(log) or next((line for line in reversed(log.splitlines()) if line.strip()), "it said nothing")


async def until_ready(client: Client, process: subprocess.Popen | None, log: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await client.get("/health")
        except (aiohttp.ClientError, OSError):
            if process is None:
                raise Refused(f"no server answers at {client.url}, as --url says") from None
            if (ended := process.poll() is not None) or time.monotonic() > deadline:
                cause = why(log.read_text(errors="replace"))
                raise Refused(f"the server {'ended' if ended else 'does not answer'}: {cause} (log: {log})") from None
        await asyncio.sleep(1)


class Load:
    def __init__(self, client: Client, args: argparse.Namespace, model: str, longest: int, texts: list) -> None:
        self.client, self.model, self.longest, self.texts = client, model, longest, texts
        shortest, random_weights = args.shortest or int(args.characters**0.5), bool(args.shape)
        self.shape = Shape(args.characters, args.tokens, shortest, args.fresh, args.exact, random_weights)
        self.always = fixed(model, texts, args.characters, min(32, args.tokens))
        self.seed, self.end, self.concurrency = args.seed, 0.0, args.concurrency
        self.left = args.requests or float("inf")
        self.done: Counter[str] = Counter()
        self.cut = self.tokens = self.same = self.other = 0
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self.samples: list[dict] = []
        self.counters: dict[str, float] = {}

    async def tokens_of_the_fixed(self) -> list[list[int]]:
        return [(await self.client.ask(request))[1]["choices"][0]["token_ids"] for request in self.always]

    async def worker(self, number: int, expected: list[list[int]]) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while time.monotonic() < self.end and self.left > 0:
            self.left -= 1
            drawn = rng.random()
            if drawn < self.shape.malformed:
                request = malformed(rng, self.model, self.longest)
            elif drawn > 1 - self.shape.exact / 8:
                request = rng.choice(self.always)
            else:
                request = well_formed(rng, self.model, self.texts, self.shape)
            begin = time.monotonic()
            try:
                tokens, found = await self.client.ask(request)
            except TimeoutError:
                if request.cut_after is None:
                    self.wrong.append(f"{request.kind}: no answer in {self.client.patience:g} s")
                else:
                    self.cut += 1
                continue
            except (Wrong, aiohttp.ClientError, ValueError) as error:
                self.wrong.append(f"{request.kind}: {type(error).__name__}: {error}; asked {request.body[-200:]!r}")
                continue
            self.done[request.kind] += 1
            self.tokens += tokens
            if tokens:
                self.seconds.append(time.monotonic() - begin)
            if request in self.always:
                same = found["choices"][0]["token_ids"] == expected[self.always.index(request)]
                self.same, self.other = self.same + same, self.other + (not same)

    def stop(self) -> None:
        """No other request begins, and what was found until then is reported; a second time it breaks off."""
        self.left = 0
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)

    async def sampler(self, processes) -> None:
        begin = time.monotonic()
        while True:
            at = time.monotonic()
            with suppress(aiohttp.ClientError, TimeoutError):
                metrics = await self.client.metrics()
                of = {name: metrics.get(f"vllm:{name}") for name in GAUGES}
                if len(self.samples) % 30 == 0:
                    answered = sum(self.done.values())
                    say(f"{at - begin:.0f} s: {answered} answered, {self.cut} cut, {len(self.wrong)} wrong")
                self.samples.append({"second": round(at - begin, 1), "mib": memory(processes), **of})
            await asyncio.sleep(max(0.0, 1 - (time.monotonic() - at)))

    async def run(self, minutes: float, processes) -> dict[str, str | None]:
        """Each check, and what is wrong, or None."""
        before, first = await self.tokens_of_the_fixed(), await self.client.metrics()
        sampler = asyncio.create_task(self.sampler(processes))
        self.end = time.monotonic() + 60 * minutes
        await asyncio.gather(*(self.worker(number, before) for number in range(self.concurrency)))
        sampler.cancel()
        checks = {"every request got what it should": "\n".join(self.wrong[:20]) or None}
        try:
            checks["nothing runs, waits or holds a page"] = await self.at_rest()
            after, counters = await self.tokens_of_the_fixed(), await self.client.metrics()
        except (Wrong, aiohttp.ClientError, TimeoutError) as error:
            return checks | {"the server still answers": f"{type(error).__name__}: {error}"}
        self.counters = {name: counters[name] - first.get(name, 0) for name in sorted(counters)}
        checks["the server still answers"] = None
        if not self.shape.random_weights:
            same = None if before == after else f"{before} before, {after} after"
            checks["greedy exact requests get the same tokens as before"] = same
        else:
            say("which tokens greedy exact requests get is not checked: rounding decides it with random weights")
        return checks

    async def at_rest(self, seconds: float = 60) -> str | None:
        deadline = time.monotonic() + seconds
        while True:
            now = {name: (await self.client.metrics()).get(f"vllm:{name}") for name in GAUGES}
            if not any(now.values()):
                return None
            if time.monotonic() > deadline:
                return str(now)
            await asyncio.sleep(0.5)

    def figures(self) -> dict:
        well_formed = sum(count for kind, count in self.done.items() if not kind.startswith("malformed"))
        there = bool(self.samples) and self.samples[-1]["mib"] is not None
        return {
            "requests": {
                "answered": well_formed,
                "malformed": sum(self.done.values()) - well_formed,
                "cut": self.cut,
                "wrong": len(self.wrong),
                "by_kind": dict(sorted(self.done.items())),
            },
            "exact_beside_others": {"same_tokens": self.same, "others": self.other},
            "tokens": self.tokens,
            "latency_s": {f"p{p}": round(float(np.percentile(self.seconds or [0], p)), 2) for p in (50, 99)},
            "memory": growth(self.samples) if there else None,
            "counters": {name: round(value) for name, value in self.counters.items() if name.startswith("specattn:")},
            "preemptions": self.counters.get("vllm:num_preemptions_total"),
            "samples": self.samples[::10],
        }


async def measured(args: argparse.Namespace, process: subprocess.Popen | None, url: str, texts: list) -> dict:
    pid = args.pid or (process and process.pid)
    client = Client(url, args.patience)
    try:
        say(f"waiting for the server (log: {args.log})" if process else f"waiting for {url}")
        await until_ready(client, process, args.log)
        [model, *_] = json.loads(await client.get("/v1/models"))["data"]
        load = Load(client, args, model["id"], model["max_model_len"], texts)
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, load.stop)
        checks = await load.run(args.minutes, psutil.Process(pid) if pid else None)
    finally:
        await client.session.close()
    return {"checks": checks, **load.figures()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", help="a running server [one is started]")
    add("--pid", type=int, help="with --url: the server's first process, to read its memory")
    add("--shape", choices=shape_names(with_draft=True)[1:], help="serve random weights of it, not scripts/serve")
    add("--minutes", type=float, default=10, metavar="N", help="at most [%(default)g]")
    add("--requests", type=given.positive, metavar="N", help="after which the clients stop [none but by --minutes]")
    add("--concurrency", type=given.positive, default=64, metavar="N", help="requests at a time [%(default)s]")
    add(
        "--characters",
        type=int,
        default=6000,
        metavar="N",
        help="of the longest prompts; with --shape, tokens [%(default)s]",
    )
    add("--shortest", type=int, metavar="N", help="characters or tokens of the shortest prompts [root of the longest]")
    add("--fresh", type=float, default=1 / 3, metavar="SHARE", help="of the prompts that share no beginning [1/3]")
    add("--exact", type=float, default=1 / 4, metavar="SHARE", help="of exact requests, which find no prefix [1/4]")
    add("--tokens", type=int, default=48, metavar="N", help="most tokens of an answer [%(default)s]")
    add("--patience", type=float, default=300, metavar="S", help="after which a request is lost [%(default)g]")
    add("--text", type=given.document, nargs="+", metavar="FILE", help="prompts [modules of Python's library]")
    add("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    add("--log", type=Path, default=Path("load.log"), metavar="FILE", help="of the server [%(default)s]")
    add("--out", type=Path, metavar="FILE", help="JSON; runs of other names in it are kept")
    add("--name", default="load", help="of this run in --out [%(default)s]")
    add("serve", nargs="*", metavar="-- ARGUMENT", help="of scripts/serve")
    args = parser.parse_args()
    if args.url and args.serve:
        parser.error("--url names a running server, which takes no arguments of scripts/serve: leave one of them out")
    if args.shape and (args.url or args.text):
        parser.error("--shape serves its own weights and asks for tokens: leave --url and --text out")
    if args.shape:
        texts = token_ids(args.shape, args.characters, args.seed)
    else:
        texts = [path.read_text() for path in args.text] if args.text else [text for _, text in held_out()]
    of = provenance() | {"command": shlex.join(["scripts/trust/load.py", *sys.argv[1:]])}
    made = tempfile.TemporaryDirectory(prefix="specattn-load-")
    if args.url:
        process, url = None, args.url.rstrip("/")
    elif args.shape:
        process, url = of_shape(args.shape, args.serve, Path(made.name), args.log)
    else:
        process, url = of_real_weights(args.serve, args.log)
    try:
        found = asyncio.run(measured(args, process, url, texts))
    finally:
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        made.cleanup()
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    settings |= malloc() if process is not None else {}
    if args.out:
        runs = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(runs | {args.name: {**of, "settings": settings, **found}}, indent=1) + "\n")
    told = ("requests", "exact_beside_others", "tokens", "latency_s", "preemptions", "memory")
    print(json.dumps({name: found[name] for name in told}, indent=1))
    for check, wrong in found["checks"].items():
        print(f"{'FAILED' if wrong else 'ok':6} {check}{f': {wrong}' if wrong else ''}")
    sys.exit(any(found["checks"].values()))


if __name__ == "__main__":
    main()

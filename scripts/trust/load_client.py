"""What a load sees of a server: answers, metrics, and the memory of its processes (scripts/trust/load.py)."""

import asyncio
import json
import re
from collections import defaultdict
from contextlib import suppress

import aiohttp
import numpy as np
import psutil
from load_requests import Request

METRIC = re.compile(r"^((?:vllm|specattn):\w+)(?:\{(.*)\})? (\S+)$", re.M)
WINDOW = 15
"""Seconds over which memory is averaged before a line is fitted: neighbouring samples are nearly the same."""


class Wrong(Exception):
    """A request did not get what it should."""


class Client:
    def __init__(self, url: str, patience: float) -> None:
        self.url, self.patience = url, patience
        connector = aiohttp.TCPConnector(limit=0)
        self.session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=patience))

    async def get(self, path: str) -> str:
        async with self.session.get(self.url + path) as answer:
            answer.raise_for_status()
            return await answer.text()

    async def metrics(self) -> dict[str, float]:
        """Sums by name, and by what the plugin's counters tell apart."""
        found: dict[str, float] = defaultdict(float)
        for name, labels, value in METRIC.findall(await self.get("/metrics")):
            if not name.endswith(("_bucket", "_created")):
                told_apart = re.findall(r'(?:kind|reason|by)="([^"]*)"', labels) if name.startswith("specattn:") else []
                found[" ".join((name, *told_apart))] += float(value)
        return found

    async def ask(self, request: Request) -> tuple[int, dict]:
        """Tokens that it got, and the answer. Raises Wrong if it is not what the request should get, and TimeoutError
        where the client goes away."""
        headers = {"Content-Type": "application/json"}
        async with (
            asyncio.timeout(request.cut_after),
            self.session.post(self.url + request.path, data=request.body, headers=headers) as answer,
        ):
            if request.malformed:
                return 0, self.refused(answer.status, await answer.text())
            if answer.status != 200:
                raise Wrong(f"status {answer.status}: {(await answer.text())[:300]}")
            found = await self.streamed(answer) if request.stream else await answer.json()
        tokens = found["usage"]["completion_tokens"]
        if not 1 <= tokens <= request.tokens or (request.all_tokens and tokens != request.tokens):
            raise Wrong(f"{tokens} tokens, asked for {request.tokens}")
        return tokens, found

    @staticmethod
    def refused(status: int, text: str) -> dict:
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, TypeError, KeyError):
            message = ""
        if not 400 <= status < 500 or not message:
            raise Wrong(f"malformed, and the answer is {status}: {text[:300]}")
        return {}

    @staticmethod
    async def streamed(answer: aiohttp.ClientResponse) -> dict:
        """Its last part with a usage; the stream has to end as streams do."""
        last, ended = {}, False
        async for line in answer.content:
            if line.startswith(b"data: "):
                ended = line.strip() == b"data: [DONE]"
                part = {} if ended else json.loads(line[6:])
                if "error" in part:
                    raise Wrong(f"an error in a stream: {part['error']}")
                last = part if part.get("usage") else last
        if not ended or not last:
            raise Wrong("a stream without an end")
        return last


def memory(first: psutil.Process | None) -> dict[str, float] | None:
    """MiB of each of a server's processes, by name; what several share counts for each."""
    if first is None:
        return None
    found: dict[str, float] = defaultdict(float)
    for process in (first, *first.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found[process.name()] += round(process.memory_info().rss / 2**20, 1)
    return found


def growth(samples: list[dict]) -> dict[str, dict]:
    """Of each process, and of all: a line through the second half of the time, fitted to means of WINDOW seconds; its
    standard error too."""
    half, found = samples[-1]["second"] / 2, {}
    late = [sample for sample in samples if sample["second"] >= half]
    for name in ("all", *samples[-1]["mib"]):
        of = [mib_of(sample, name) for sample in samples]
        found[name] = {"first_mib": of[0], "last_mib": of[-1], "most_mib": max(of)}
        windows = defaultdict(list)
        for sample in late:
            windows[int((sample["second"] - half) // WINDOW)].append(mib_of(sample, name))
        if len(windows) >= 4:
            minutes, means = np.array([*windows]) * WINDOW / 60, [np.mean(of) for of in windows.values()]
            (per_minute, _), covariance = np.polyfit(minutes, means, 1, cov=True)
            found[name]["mib_per_minute"] = round(float(per_minute), 3)
            found[name]["standard_error"] = round(float(covariance[0, 0]) ** 0.5, 3)
    return found


def mib_of(sample: dict, name: str) -> float:
    return round(sum(sample["mib"].values()) if name == "all" else sample["mib"].get(name, 0.0), 1)

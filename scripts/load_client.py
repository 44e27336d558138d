"""What a load sees of a server: answers, metrics, and the memory of its processes (scripts/load.py)."""

import asyncio
import json
import re
from collections import defaultdict

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


def memory(processes) -> float | None:
    """MiB of a server's processes together; what several share counts for each."""
    if processes is None:
        return None
    total = 0
    for process in (processes, *processes.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return round(total / 2**20, 1)


def slope(samples: list[dict]) -> dict:
    """A line through the second half of the time, fitted to means of WINDOW seconds; its standard error too."""
    half = samples[-1]["second"] / 2
    windows = defaultdict(list)
    for sample in samples:
        if sample["second"] >= half:
            windows[int((sample["second"] - half) // WINDOW)].append(sample["rss"])
    found = {"first_mib": samples[0]["rss"], "last_mib": samples[-1]["rss"], "most_mib": max(s["rss"] for s in samples)}
    if len(windows) >= 4:
        minutes, means = np.array([*windows]) * WINDOW / 60, [np.mean(of) for of in windows.values()]
        (per_minute, _), covariance = np.polyfit(minutes, means, 1, cov=True)
        error = float(covariance[0, 0]) ** 0.5
        found |= {"mib_per_minute": round(float(per_minute), 3), "standard_error": round(error, 3)}
    return found

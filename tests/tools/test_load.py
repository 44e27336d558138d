"""What scripts/trust/load.py takes for wrong: no server is started."""

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "trust"


@pytest.fixture
def client(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import load_client

    yield load_client
    for name in ("load_client", "load_requests"):
        del sys.modules[name]


REFUSAL = json.dumps({"error": {"message": "max_tokens must be positive"}})


@pytest.mark.parametrize(("status", "text"), [(200, REFUSAL), (500, REFUSAL), (400, "{}"), (400, "<html>")])
def test_a_malformed_request_has_to_be_refused_in_words(client, status, text):
    with pytest.raises(client.Wrong, match=f"malformed, and the answer is {status}"):
        client.Client.refused(status, text)
    assert client.Client.refused(400, REFUSAL) == {}


def stream(*lines: str):
    async def content():
        for line in lines:
            yield f"data: {line}\n".encode()

    return SimpleNamespace(content=content())


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 4}})


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ((USAGE,), "a stream without an end"),
        (("[DONE]",), "a stream without an end"),
        ((json.dumps({"error": {"message": "gone"}}), "[DONE]"), "an error in a stream"),
    ],
)
def test_a_stream_has_to_end_as_streams_do(client, lines, told):
    with pytest.raises(client.Wrong, match=told):
        asyncio.run(client.Client.streamed(stream(*lines)))
    assert asyncio.run(client.Client.streamed(stream(USAGE, "[DONE]")))["usage"] == {"completion_tokens": 4}


def test_memory_that_grows_has_a_slope(client):
    samples = [{"second": second, "mib": {"worker": 100 + second / 30, "server": 50.0}} for second in range(600)]
    found = client.growth(samples)
    assert found["worker"]["mib_per_minute"] == pytest.approx(2, abs=0.01)
    assert found["server"]["mib_per_minute"] == pytest.approx(0, abs=0.01)
    assert found["all"]["last_mib"] == pytest.approx(170, abs=0.1)

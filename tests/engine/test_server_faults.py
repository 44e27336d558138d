"""A server whose clients go away or do not read, and whose engine is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

openai = pytest.importorskip("openai")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SHARED = pytest.mark.xdist_group("server faults")


@pytest.fixture(scope="module")
def serve(server_class):
    def start(log: Path, port: int = 0, **environment: str):
        def command(port: int) -> list[str]:
            where = ["--host", "127.0.0.1", "--port", str(port), "--gpu-memory-utilization", "0.3"]
            return [str(ROOT / "scripts" / "serve"), *where]

        environment |= {"SPECATTN_VENV": sys.prefix, "VLLM_LOGGING_LEVEL": "INFO"}
        return server_class(log, command, port=port, **environment)

    return start


@pytest.fixture(scope="module")
def server(serve, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server") / "log") as started:
        started.wait_until_ready()
        yield started


@pytest.fixture(scope="module")
def long_prompts(demo_pair, held_out_code):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(demo_pair[0])(held_out_code, add_special_tokens=False).input_ids
    return [ids[i * 900 : i * 900 + 600 + 37 * i] for i in range(10)]


def client_of(server):
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=300, max_retries=0)


def gauge(server, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^vllm:{name}{{.*}} (\S+)$", server.ask("/metrics"), re.M))


def wait_until(what, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.2)


def at_rest(server) -> None:
    """Nobody runs or waits, and no page of the cache is held."""
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        wait_until(lambda name=name: gauge(server, name) == 0)


async def ask(client, prompt, tokens: int, **arguments) -> str:
    answer = await client.completions.create(
        model="demo", prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}, **arguments
    )
    assert answer.usage.completion_tokens == tokens
    return answer.choices[0].text


@SHARED
def test_clients_that_go_away_leave_nothing_behind(server, long_prompts):
    """Streams are cut in the prompt, after a token, and later; others get what they get alone."""
    alone = asyncio.run(ask(client_of(server), long_prompts[0], 16))

    async def cut(client, prompt, pieces: int) -> None:
        stream = await client.completions.create(
            model="demo", prompt=prompt, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        if pieces:
            async for _ in stream:
                pieces -= 1
                if not pieces:
                    break
        await stream.close()

    async def given_up(client, prompt) -> None:
        """Before there is anything to read."""
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ask(client, prompt, 200), 0.3)

    async def together():
        client = client_of(server)
        going = [cut(client, prompt, number % 4) for number, prompt in enumerate(long_prompts[1:7])]
        going += [given_up(client, prompt) for prompt in long_prompts[7:10]]
        return (await asyncio.gather(ask(client, long_prompts[0], 16), *going))[0]

    # Not compared: on a GPU, in bfloat16, rounding depends on the batch.
    assert asyncio.run(together())
    at_rest(server)
    assert asyncio.run(ask(client_of(server), long_prompts[0], 16)) == alone


@SHARED
def test_a_client_that_never_reads_stops_nobody(server, long_prompts):
    body = {"model": "demo", "prompt": long_prompts[1], "max_tokens": 400, "stream": True, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}"
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(f"{head}\r\n\r\n".encode() + content)
        wait_until(lambda: gauge(server, "num_requests_running") > 0)

        async def others():
            client = client_of(server)
            return await asyncio.gather(*(ask(client, prompt, 16) for prompt in long_prompts[2:5]))

        assert all(asyncio.run(others()))
    at_rest(server)


@SHARED
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "demo"}',
        b'{"model": "demo", "prompt": [99999999], "max_tokens": 4}',
        b'{"model": "demo", "prompt": [-1], "max_tokens": 4}',
        b'{"model": "demo", "prompt": "a", "max_tokens": -4}',
        b'{"model": "demo", "prompt": "a", "max_tokens": 4, "vllm_xargs": {"specattn": ["exact"]}}',
        b'{"model": "demo", "prompt": "a", "max_tokens": 4, "vllm_xargs": {"specattn": {"ratio": 1}}}',
        b'{"model": "demo", "prompt": "a", "max_tokens": 4, "vllm_xargs": {"specattn.ratio": 0.1}}',
        b'{"model": "demo", "prompt": "a", "max_tokens": 4, "vllm_xargs": "specattn"}',
        b'{"model": "demo", "prompt": "' + b"a " * 60_000 + b'", "max_tokens": 4}',
    ],
    ids=lambda body: body[:80].decode(),
)
def test_a_bad_request_is_the_client_s_error(server, body):
    import urllib.error

    with pytest.raises(urllib.error.HTTPError) as refused:
        server.ask("/v1/completions", body or b" ")
    assert 400 <= refused.value.code < 500, refused.value.read()[:300]
    at_rest(server)


# Small numbers and huge ones: those between are sizes of a request that is good, and takes minutes.
NUMBERS = st.integers(-3, 3) | st.integers(2**31, 2**70) | st.floats()
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
OURS = st.dictionaries(st.sampled_from(["specattn", "specatn", "specattn.ratio", "other"]), ANYTHING, max_size=2)
FIELDS = """
prompt messages model n seed stop stream stream_options temperature top_p top_k logprobs vllm_xargs presence_penalty
repetition_penalty ignore_eos stop_token_ids structured_outputs bad_words logit_bias echo priority
"""
WRONG = st.dictionaries(st.sampled_from(FIELDS.split()), ANYTHING, max_size=2)
CHAT = {"messages": [{"role": "user", "content": "a"}]}


@SHARED
@settings(max_examples=60)
@given(chat=st.booleans(), wrong=WRONG, xargs=st.none() | OURS)
def test_no_body_is_the_server_s_error(server, chat, wrong, xargs):
    """Whatever a field holds, the answer is one, or an error of the client's with a message."""
    import urllib.error

    body = {"model": "demo", "max_tokens": 2} | (CHAT if chat else {"prompt": "a"}) | wrong
    if xargs is not None:
        body["vllm_xargs"] = xargs
    try:
        server.ask("/v1/chat/completions" if chat else "/v1/completions", json.dumps(body).encode())
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        assert 400 <= error.code < 500, (body, text)
        assert json.loads(text)["error"]["message"], body


@SHARED
def test_a_short_load_leaves_nothing_behind(server, tmp_path):
    """scripts/trust/load.py, on this server."""
    where = ["--url", f"http://127.0.0.1:{server.port}", "--pid", str(server.process.pid), "--out", tmp_path / "load"]
    size = ["--minutes", "0.1", "--concurrency", "12", "--characters", "1500", "--tokens", "12"]
    command = [sys.executable, "-P", ROOT / "scripts/trust/load.py", *where, *size]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "load").read_text())["load"]
    assert found["requests"]["answered"] >= 12 and found["memory"]["all"]["first_mib"] > 100
    assert found["counters"]["specattn:rows_total sparse"] > 0


def processes_of(server) -> list[psutil.Process]:
    whole = psutil.Process(server.process.pid)
    return [whole, *whole.children(recursive=True)]


def nothing_left_of(processes: list[psutil.Process], seconds: float = 20) -> None:
    _, left = psutil.wait_procs(processes, timeout=seconds)
    for process in left:
        process.kill()  # else they would be left to the tests after this one too
    assert not left, f"processes that were left behind: {left}"


async def under_load(server, prompts, tokens: int, then, patience: float = 300) -> list:
    """What eight requests got; `then` is called once they run. patience: seconds after which a client gives up."""
    client = client_of(server).with_options(timeout=patience)
    going = [asyncio.create_task(ask(client, prompt, tokens)) for prompt in prompts[:8]]
    while gauge(server, "num_requests_running") < 2:
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    then()
    return await asyncio.wait_for(asyncio.gather(*going, return_exceptions=True), 300)


@SHARED
def test_a_server_that_is_told_to_end_under_load_ends(server, long_prompts):
    """vLLM answers no request that is open then, or each with an error, and ends when the clients have gone; stock vLLM
    does the same. The last of those that share the server."""
    mine = processes_of(server)
    tell = partial(server.process.send_signal, signal.SIGTERM)
    got = asyncio.run(under_load(server, long_prompts, 600, tell, patience=20))
    assert all(isinstance(answer, openai.APIError) for answer in got), got
    server.process.wait(60)
    nothing_left_of(mine)


def test_a_server_whose_engine_is_killed_says_so_and_ends(serve, tmp_path, long_prompts):
    with serve(tmp_path / "log") as server:
        server.wait_until_ready()
        mine = processes_of(server)
        [engine] = [process for process in mine if "EngineCore" in process.name() + " ".join(process.cmdline())]
        got = asyncio.run(under_load(server, long_prompts, 600, engine.kill))
        assert all(isinstance(answer, Exception) for answer in got), "an answer from an engine that is gone"
        server.process.wait(60)  # its exit status is vLLM's own, and 0
        assert "EngineDeadError" in server.text()
        nothing_left_of(mine)


def test_a_server_that_is_killed_leaves_nothing_and_starts_again_on_its_port(serve, tmp_path, long_prompts):
    """SIGKILL to the whole group, as from a supervisor or a container's end. To the server's first process alone it
    would leave vLLM's engine behind: nothing in vLLM 0.32 tells an engine that its server is gone."""
    with serve(tmp_path / "first") as server:
        server.wait_until_ready()
        mine = processes_of(server)
        kill = partial(os.killpg, server.process.pid, signal.SIGKILL)
        got = asyncio.run(under_load(server, long_prompts, 600, kill))
        assert all(isinstance(answer, openai.APIError) for answer in got), got
        nothing_left_of(mine)
    with serve(tmp_path / "second", server.port) as again:
        again.wait_until_ready()
        assert asyncio.run(ask(client_of(again), long_prompts[0], 16))


@pytest.mark.parametrize("stage", [pytest.param("drafting", marks=pytest.mark.long), "verifying"])
def test_a_worker_that_dies_in_the_middle_of_a_round_ends_the_server(serve, tmp_path, long_prompts, stage):
    """Between two layers, of the draft model or of the target: whoever waits is told so, and no process is left."""
    plugin, when = tmp_path / "plugin", tmp_path / "when"
    (plugin / "killer-1.dist-info").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("dying_worker.py"), plugin)
    (plugin / "killer-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: killer\nVersion: 1\n")
    (plugin / "killer-1.dist-info/entry_points.txt").write_text(
        "[vllm.general_plugins]\nkiller = dying_worker:install\n"
    )
    path = os.pathsep.join(filter(None, (str(plugin), os.environ.get("PYTHONPATH"))))
    with serve(tmp_path / "log", PYTHONPATH=path, DIE=stage, DIE_WHEN=str(when)) as server:
        server.wait_until_ready()
        mine = processes_of(server)
        got = asyncio.run(under_load(server, long_prompts, 600, when.touch))
        assert all(isinstance(answer, openai.APIError) for answer in got), got
        server.process.wait(60)
        [killed] = tmp_path.glob("when.by.*")
        assert int(killed.suffix[1:]) in {process.pid for process in mine[1:]}
        assert "EngineDeadError" in server.text()
        nothing_left_of(mine)

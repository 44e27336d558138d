"""The server that `scripts/serve` starts, driven as users drive it: by the openai client, several at once."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from pathlib import Path

import pytest

from specattn_vllm.options import SpecAttnOptions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 64
LINE = re.compile(
    r"specattn: (\d+) rounds in \d+ s, acceptance length ([\d.]+), (?:verification|target) read ([\d.]+)% of KV\b.*?"
    r"dense (?:verification )?rows (\d+)"
)


@pytest.fixture(scope="module")
def serve(server_class):
    """serve(log, *arguments of scripts/serve, interval=seconds between the plugin's lines in the log) -> the server."""

    def start(log: Path, *arguments: str, interval: float = 5):
        def command(port: int) -> list[str]:
            return [
                str(ROOT / "scripts" / "serve"),
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                # Two at a time, and the engine of a test beside them, have to fit on one GPU.
                "--gpu-memory-utilization",
                "0.3",
                "--additional-config.specattn.stats_interval_s",
                str(interval),
                *arguments,
            ]

        # The environment that runs this test is the one to serve from.
        return server_class(log, command, SPECATTN_VENV=sys.prefix, VLLM_LOGGING_LEVEL="INFO")

    return start


SHARED = pytest.mark.xdist_group("server")


@pytest.fixture(scope="module")
def server(serve, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server") / "log") as started:
        started.wait_until_ready()
        yield started


@pytest.fixture
def client(server):
    import openai

    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=600)


@SHARED
def test_eight_at_once_of_mixed_length(server, client, prompts):
    """Streaming and not, greedy and sampled, up to 6k tokens of held-out code, one given up midway."""
    ids = [p["prompt_token_ids"] for p in prompts([20, 200, 700, 1500, 2500, 4000, 6000, 5500])]

    async def whole(prompt, **arguments):
        answer = await client.completions.create(model="demo", prompt=prompt, max_tokens=40, **arguments)
        assert answer.usage.prompt_tokens == len(prompt)
        return answer.choices[0].finish_reason, answer.usage.completion_tokens, answer.choices[0].text

    async def streamed(prompt, stop_after: int | None = None, **arguments):
        stream = await client.completions.create(
            model="demo", prompt=prompt, max_tokens=40, stream=True, stream_options={"include_usage": True}, **arguments
        )
        text, tokens, reason, pieces = "", 0, None, 0
        async for part in stream:
            if part.usage is not None:
                tokens = part.usage.completion_tokens
            for choice in part.choices:
                text += choice.text
                reason = choice.finish_reason or reason
                pieces += 1
            if stop_after is not None and pieces >= stop_after:
                await stream.close()
                return "aborted", pieces, text
        return reason, tokens, text

    async def all_at_once():
        return await asyncio.gather(
            whole(ids[0], temperature=0),
            streamed(ids[1], temperature=0),
            whole(ids[2], temperature=0.8, top_p=0.9, seed=1),
            streamed(ids[3], temperature=0.8, seed=2),
            streamed(ids[4], temperature=0, stop_after=3),
            whole(ids[5], temperature=0),
            streamed(ids[6], temperature=0, extra_body={"ignore_eos": True}),
            whole(ids[7], temperature=0.7, seed=3, extra_body={"ignore_eos": True}),
        )

    answers = asyncio.run(all_at_once())
    assert [reason for reason, _, _ in answers].count("aborted") == 1
    for reason, tokens, text in answers:
        assert reason in ("length", "stop", "aborted")
        assert text
        if reason == "length":
            assert tokens == 40


@SHARED
@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.8, "extra_body": {"top_k": 5}},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0.8, "extra_body": {"repetition_penalty": 1.2}},
        {"temperature": 0, "logprobs": 3},
        {"temperature": 0, "extra_body": {"prompt_logprobs": 2}},
        {"temperature": 1.0, "n": 2, "seed": 7},
        {"temperature": 0, "stop": ["\n"]},
        {"temperature": 0, "extra_body": {"bad_words": ["self"]}},
        {"temperature": 0, "extra_body": {"structured_outputs": {"regex": "[a-z]{5}"}}},
        {"temperature": 0, "extra_body": {"min_tokens": 5}},
    ],
    ids=lambda arguments: " ".join(arguments.get("extra_body", arguments)),
)
def test_each_way_of_sampling_is_served(server, client, arguments):
    """On CPU each of these goes through another of vLLM's kernels, and one that fails stops the whole server."""

    async def ask():
        prompt = "import os\n\ndef main("
        return await client.completions.create(model="demo", prompt=prompt, max_tokens=12, **arguments)

    answer = asyncio.run(ask())
    assert len(answer.choices) == arguments.get("n", 1)
    assert all(choice.text for choice in answer.choices)
    if "structured_outputs" in arguments.get("extra_body", {}):
        assert re.fullmatch("[a-z]{5}", answer.choices[0].text)


@SHARED
def test_a_request_can_ask_for_exact_verification(server, client, prompts):
    """Beside one that is pruned. What an exact answer is worth is tested where plain decoding can be compared with."""
    [prompt] = [p["prompt_token_ids"] for p in prompts([3000])]
    exact = {"vllm_xargs": {"specattn": "exact"}, "ignore_eos": True}

    async def ask(**extra):
        return await client.completions.create(
            model="demo", prompt=prompt, max_tokens=60, temperature=0, extra_body=extra
        )

    async def beside_another_and_alone():
        first, _ = await asyncio.gather(ask(**exact), ask(ignore_eos=True))
        return first, await ask(**exact)

    first, again = asyncio.run(beside_another_and_alone())
    assert first.usage.completion_tokens == 60
    assert first.choices[0].text == again.choices[0].text


@SHARED
def test_a_wrong_wish_is_the_client_s_error(server, client):
    import openai

    async def ask():
        return await client.completions.create(
            model="demo", prompt="import os\n", max_tokens=4, extra_body={"vllm_xargs": {"specattn": "always"}}
        )

    with pytest.raises(openai.BadRequestError, match="the only value is 'exact'"):
        asyncio.run(ask())


@SHARED
def test_nothing_of_a_prompt_or_an_answer_is_in_the_log_or_in_the_metrics(server, client):
    """Of a request that is served, of one that is given up, and of one that is refused."""
    import urllib.request

    import openai

    prompt = "zebra_marmalade = 40412\n" * 30

    async def ask():
        answer = await client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0)
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(
                model="demo", prompt=prompt, max_tokens=4, extra_body={"vllm_xargs": {"specattn": "always"}}
            )
        stream = await client.completions.create(model="demo", prompt=prompt, max_tokens=24, stream=True)
        await stream.close()
        return answer.choices[0].text

    text = asyncio.run(ask())
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as page:
        metrics = page.read().decode()
    assert "specattn:info" in metrics
    for told in (server.text(), metrics):
        assert "marmalade" not in told and "40412" not in told
        assert len(text.strip()) < 8 or text.strip() not in told


@SHARED
def test_chat_is_served(server, client):
    async def ask():
        return await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "def f(x):\n"}], max_tokens=8, temperature=0
        )

    assert asyncio.run(ask()).choices[0].message.content


@SHARED
def test_a_request_after_an_abort_is_served(server, client):
    async def ask():
        return await client.completions.create(model="demo", prompt="import os\n", max_tokens=8, temperature=0)

    assert asyncio.run(ask()).choices[0].text


@SHARED
def test_the_log_says_how_much_was_read_of_long_contexts(server, client, prompts):
    """Long requests by themselves: what the line reports for their interval is what their verification read."""
    ids = [p["prompt_token_ids"] for p in prompts([6000, 5500])]
    before = len(LINE.findall(server.text()))

    async def both():
        await asyncio.gather(
            *(
                client.completions.create(
                    model="demo", prompt=prompt, max_tokens=120, temperature=0, extra_body={"ignore_eos": True}
                )
                for prompt in ids
            )
        )

    asyncio.run(both())
    lines = LINE.findall(server.text())[before:]
    assert lines, "no statistics line while two long requests ran"
    # The first line of the stretch may still count rounds of the tests before.
    rounds, acceptance, read, _dense = lines[-1]
    assert int(rounds) > 0
    assert 1.0 < float(acceptance) <= 5.0
    assert float(read) < 40.0


@SHARED
def test_start_up_says_that_the_method_is_approximate(server):
    assert "is APPROXIMATE" in server.text()


# One of each kind: engines show that specattn and streamingllm are as good as these.
@pytest.mark.parametrize("method", ["sts", "vegas", "dense"])
def test_other_methods_are_served_alike(method, serve, tmp_path, demo_pair, prompts, plain):
    """The same command with another method; a target that drafts for itself is its own draft model."""
    import openai

    options = SpecAttnOptions.parse({"method": method})
    given = prompts([1500, 900])
    expected = plain(given, NEW_TOKENS) if options.kind.lossless else None
    models = ["--speculative-model", demo_pair[0]] if options.sparse_readers == ("drafting",) else []
    # As exact as plain decoding is: on a GPU, bfloat16 rounds other batches otherwise.
    arguments = ["--additional-config.specattn.method", method, "--dtype", "float32", *models]
    with serve(tmp_path / "log", *arguments, interval=0.5) as other:
        other.wait_until_ready()
        assert ("is APPROXIMATE" in other.text()) == (not options.kind.lossless)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{other.port}/v1", api_key="none", timeout=600)

        def ask(n: int) -> list[list[int]]:
            """Both prompts in one request."""
            made = client.completions.create(
                model="demo",
                prompt=[p["prompt_token_ids"] for p in given],
                max_tokens=n,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            return [choice.token_ids for choice in sorted(made.choices, key=lambda choice: choice.index)]

        made = ask(NEW_TOKENS)
        assert [len(tokens) for tokens in made] == [NEW_TOKENS] * 2
        if expected is not None:
            assert made == expected
        accepted_tokens = r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} (\S+)$"
        [accepted] = re.findall(accepted_tokens, other.ask("/metrics"), re.M)
        assert float(accepted) > NEW_TOKENS / 2
        # A line comes with a step, once its interval is over; the last verifications may wait for somebody's next.
        time.sleep(1)
        ask(2)
        lines = [line for line in other.text().splitlines() if " rounds in " in line]
        assert lines
        if options.kind.lossless:
            assert all("verification read all of KV" in line for line in lines)
        else:
            assert min(float(share) for _, _, share, _ in LINE.findall("\n".join(lines))) < 50
        drafting = [float(share) for share in re.findall(r"drafting read ([\d.]+)% of KV", "\n".join(lines))]
        assert bool(drafting) == ("drafting" in options.sparse_readers)
        assert all(share < 30 for share in drafting)


def test_a_method_that_makes_no_sense_is_refused_at_start(serve, tmp_path):
    """A target that drafts for itself, beside the draft model that `scripts/serve` names."""
    with serve(tmp_path / "log", "--additional-config.specattn.method", "vegas") as other:
        assert other.process.wait(300) != 0
    assert "method = 'vegas' with --speculative-model" in other.text()
    assert "leave --speculative-model out" in other.text()

"""The server that `scripts/serve` starts, with another method than the default."""

from __future__ import annotations

import re
import time

import pytest

from specattn_vllm.options import SpecAttnOptions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

NEW_TOKENS = 64


# One of each kind: engines show that specattn and streamingllm are as good as these.
LONG = [pytest.param(method, marks=pytest.mark.long) for method in ("sts", "vegas")]


@pytest.mark.parametrize("method", [*LONG, "dense"])
def test_other_methods_are_served_alike(method, serve, tmp_path, demo_pair, prompts, plain, statistics):
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
            assert min(float(share) for _, _, share, _ in statistics("\n".join(lines))) < 50
        drafting = [float(share) for share in re.findall(r"drafting read ([\d.]+)% of KV", "\n".join(lines))]
        assert bool(drafting) == ("drafting" in options.sparse_readers)
        assert all(share < 30 for share in drafting)


def test_a_method_that_makes_no_sense_is_refused_at_start(serve, tmp_path):
    """A target that drafts for itself, beside the draft model that `scripts/serve` names."""
    with serve(tmp_path / "log", "--additional-config.specattn.method", "vegas") as other:
        assert other.process.wait(300) != 0
    assert "method = 'vegas' with --speculative-model" in other.text()
    assert "leave --speculative-model out" in other.text()

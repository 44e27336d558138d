"""Logs and metrics hold nothing of prompts or output, whatever the level (SECURITY.md)."""

from __future__ import annotations

import logging

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LONG, NEW_TOKENS = 120, 30


def pieces(tokens: list[int], text: str) -> list[str]:
    """What would be seen of a text if it were written somewhere: as numbers, or as words."""
    numbers = [", ".join(map(str, tokens[i : i + 4])) for i in range(0, len(tokens) - 3, 2)]
    return numbers + [line.strip() for line in text.splitlines() if len(line.strip()) > 12]


def test_logs_and_metrics_hold_nothing_of_prompts_or_output(engine, prompts, monkeypatch, tmp_path):
    seen: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    monkeypatch.setenv("SPECATTN_METRICS_DIR", str(tmp_path))
    options = {"method": "sketch", "min_tokens": 16, "recent_tokens": 8, "ratio": 0.1, "draft_ratio": 0.2}
    options |= {"audit_share": 1.0, "stats_interval_s": 0.001}
    llm = engine(options, max_num_seqs=4, max_model_len=256, block_size=16)
    # vLLM sets its handlers anew when an engine starts.
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, Kept()])
    monkeypatch.setattr(logging.getLogger("vllm.specattn"), "level", logging.DEBUG)
    from vllm import SamplingParams

    given = prompts([LONG, LONG, LONG])
    parameters = [
        SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, extra_args={"specattn": "exact"} if i else {}
        )
        for i in range(len(given))
    ]
    answers = llm.generate(given, parameters, use_tqdm=False)
    decode = llm.get_tokenizer().decode

    told = [message for message in seen if message.startswith("specattn")]
    assert any("rounds in" in message for message in told), "no line was logged while requests ran"
    written = [*seen, *(path.read_text() for path in tmp_path.iterdir())]
    assert len(written) > len(seen), "no metrics were written"
    for answer in answers:
        for tokens in (answer.prompt_token_ids, list(answer.outputs[0].token_ids)):
            for piece in pieces(tokens, decode(tokens)):
                assert not [text for text in written if piece in text], f"{piece!r} was written down"

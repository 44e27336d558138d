"""A target that drafts for itself: the tokens of plain decoding, whatever it reads and whatever the scheduler does."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.engine

NEW_TOKENS = 16
OPTIONS = {"method": "vegas", "ratio": 0.1, "min_tokens": 32, "recent_tokens": 16}
# Prompts by what is done with them.
LENGTHS = {
    "together": [5, 127, 129, 300, 1000, 3000],
    "in chunks": [900, 40, 600, 30, 1200, 250, 500, 90],
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="vegas"),
        pytest.param({"rule": "top_p", "top_p": 0.8, "dilation": 0}, id="vegas-top_p-no_dilation"),
        pytest.param({"method": "streamingllm"}, id="streamingllm"),
    ],
)
def test_greedy_tokens_equal_plain_decoding(options, plain, engine, greedy, prompts, counts):
    expected = plain(prompts(LENGTHS["together"]), NEW_TOKENS)
    llm = engine(OPTIONS | options, max_num_batched_tokens=512)
    assert greedy(llm, prompts(LENGTHS["together"]), NEW_TOKENS) == expected
    seen = counts(llm)
    assert seen.acceptance_length > 2
    assert 0 < seen.draft_kv_read < 0.5 * seen.draft_kv_full


def test_reading_everything_every_draft_is_accepted(engine, greedy, prompts, counts):
    """Of the same weights and the same cache: what is rejected then is our doing."""
    llm = engine({"method": "vegas", "ratio": 1.0})
    greedy(llm, prompts([40, 300, 1000, 2500]), 41)
    seen = counts(llm)
    assert (seen.acceptance_length - 1) / 4 >= 0.98
    assert seen.draft_kv_read == seen.draft_kv_full > 0


def test_chunks_slots_and_cached_prefixes(plain, engine, greedy, prompts):
    """Prompts of many chunks among running requests, more requests than slots; then all of it from cached blocks, to
    which drafts have written no more than what verification wrote over."""
    from vllm import SamplingParams

    given = prompts(LENGTHS["in chunks"])
    expected = plain(given, NEW_TOKENS)
    llm = engine(OPTIONS, max_num_seqs=3, max_num_batched_tokens=256, block_size=16)
    assert greedy(llm, given, NEW_TOKENS) == expected
    # With what was generated, whose blocks were full of drafts before they were full of tokens.
    longer = [{"prompt_token_ids": p["prompt_token_ids"] + t[:-4]} for p, t in zip(given, expected, strict=True)]
    parameters = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    outputs = llm.generate(longer, parameters, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [tokens[-4:] for tokens in expected]
    cached = [output.num_cached_tokens for output in outputs]
    assert sum(n >= length for n, length in zip(cached, LENGTHS["in chunks"], strict=True)) >= 4


def test_preemption_and_resume(plain, small_pool, engine, greedy, prompts, monkeypatch):
    """A block pool too small for all requests: some lose their slot and come back in another."""
    from vllm.v1.core.sched.scheduler import Scheduler

    given = prompts(small_pool.lengths)
    expected, preempted, preempt = plain(given, 40), [], Scheduler._preempt_request

    def watch(self, *args, **kwargs):
        preempted.append(args)
        return preempt(self, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", watch)
    llm = engine(OPTIONS, **small_pool.arguments)
    assert greedy(llm, given, 40) == expected
    assert preempted


def test_abort_frees_a_slot_for_somebody_else(plain, engine, prompts):
    from vllm import SamplingParams

    given = prompts(LENGTHS["in chunks"])
    expected = plain(given, NEW_TOKENS)
    llm = engine(OPTIONS, max_num_seqs=2)
    run = llm.llm_engine
    parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    for i in (0, 2):
        run.add_request(str(i), given[i], parameters)
    for _ in range(4):
        run.step()
    run.abort_request(["0"])
    run.add_request("5", given[5], parameters)
    done = {}
    while run.has_unfinished_requests():
        done |= {o.request_id: list(o.outputs[0].token_ids) for o in run.step() if o.finished}
    assert done == {"2": expected[2], "5": expected[5]}


def test_it_drafts_as_many_tokens_as_vllm_asks_for(plain, engine, greedy, prompts, counts, monkeypatch):
    """And runs the target as often, which is what is counted: not at all where it asks for none."""
    from specattn_vllm.speculation.self_speculator import SelfSpeculator

    rounds, runs, propose, run_model = [], [], SelfSpeculator.propose, SelfSpeculator._run_model

    def watch_propose(self, *args, num_speculative_tokens=None, **kwargs):
        runs.clear()
        found = propose(self, *args, num_speculative_tokens=num_speculative_tokens, **kwargs)
        if not kwargs.get("dummy_run"):
            rounds.append((num_speculative_tokens, len(runs), sum(runs)))
        return found

    def watch_run(self, *args, **kwargs):
        rows = args[0].shape[0]
        runs.append(int(self.input_buffers.seq_lens[:rows].sum()))
        return run_model(self, *args, **kwargs)

    monkeypatch.setattr(SelfSpeculator, "propose", watch_propose)
    monkeypatch.setattr(SelfSpeculator, "_run_model", watch_run)
    given = prompts([300, 420, 130])
    expected = plain(given, NEW_TOKENS)
    llm = engine(OPTIONS, drafts_by_batch_size=[(1, 1, 4), (2, 2, 0), (3, 8, 2)])
    lengths = [4, 10, NEW_TOKENS]
    assert greedy(llm, given, lengths) == [tokens[:n] for tokens, n in zip(expected, lengths, strict=True)]
    assert all(asked == ran for asked, ran, _ in rounds), rounds
    assert {asked for asked, *_ in rounds} == {0, 2, 4}
    [runner] = llm.llm_engine.collective_rpc(lambda worker: [worker.model_runner])[0]
    selection = runner.speculator.selection
    layers = len(selection.tables.layer_sources) * selection.num_kv_heads
    assert counts(llm).draft_kv_full == layers * sum(read for *_, read in rounds)


def test_up_to_the_maximum_length_without_naming_a_draft_model(plain, engine, greedy, prompts, counts, demo_pair):
    """Drafts are cut where the context ends. `LLM(target, attention_backend=..., additional_config=...)` is enough."""
    given = prompts([505, 490])
    expected = [tokens[:n] for tokens, n in zip(plain(given, 22), (7, 22), strict=True)]
    options = {"specattn": {"method": "vegas", "ratio": 0.1, "min_tokens": 32, "recent_tokens": 16}}
    llm = engine(None, max_model_len=512, attention_backend="specattn", additional_config=options)
    assert greedy(llm, given, 22) == expected
    spec = llm.llm_engine.vllm_config.speculative_config
    assert (spec.model, spec.num_speculative_tokens) == (demo_pair[0], 6)
    assert counts(llm).acceptance_length > 2


def test_what_is_captured_is_the_attention_of_the_target(engine, greedy, prompts, monkeypatch, demo_pair):
    """Against transformers: after the prompt, and after verifications with and without rejected drafts."""
    from transformers import LlamaForCausalLM

    from specattn_vllm.selection.target_capture import TargetCapture
    from specattn_vllm.speculation.self_speculator import SelfSpeculator

    seen, drafts = [], [torch.tensor([], dtype=torch.int64)]
    select, round_ = TargetCapture.select, SelfSpeculator._round

    def watch_select(self, wanted, committed):
        result = select(self, wanted, committed)
        seen.append((int(result[1][0]), int(committed[0]), self.mass[0, :, 0].clone().cpu(), drafts[-1]))
        return result

    def watch_round(self, batch, *args, **kwargs):
        result = round_(self, batch, *args, **kwargs)
        drafts.append(result[0].clone().cpu().long())
        return result

    monkeypatch.setattr(TargetCapture, "select", watch_select)
    monkeypatch.setattr(SelfSpeculator, "_round", watch_round)
    [prompt] = prompts([333])
    llm = engine({**OPTIONS, "min_tokens": 0, "dilation": 0})  # the attention itself, before it is spread
    drafts.clear()
    drafts.append(torch.tensor([], dtype=torch.int64))
    seen.clear()
    [tokens] = greedy(llm, [prompt], 40)
    sequence = torch.tensor(prompt["prompt_token_ids"] + tokens)
    target = LlamaForCausalLM.from_pretrained(demo_pair[0], dtype=torch.float32, attn_implementation="eager")
    first, *rounds = seen
    assert first[:2] == (333, 333)
    accepted = [committed - length for length, committed, _, _ in rounds]
    assert 4 in accepted and min(accepted) < 4, "rounds with all drafts accepted, and with some rejected"
    # On CUDA, scores are stored as bfloat16: a logit of 8 to 16 is off by up to 1/32, its weight by as much of itself.
    rtol, atol = (5e-2, 1e-3) if torch.cuda.is_available() else (1e-3, 1e-5)
    for length, _, mass, verified in (first, rounds[accepted.index(4)], rounds[accepted.index(min(accepted))]):
        with torch.no_grad():
            given = torch.cat((sequence[:length], verified))
            attentions = target(given[None], output_attentions=True).attentions
        for layer, attention in enumerate(attentions):
            # The first row of a verification is that of the last token that is certain; a prompt has one row.
            expected = attention[0, :, [length - 1, -1], :length].mean((0, 1))
            torch.testing.assert_close(mass[layer, :length], expected, rtol=rtol, atol=atol)

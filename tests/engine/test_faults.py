"""Pages of the KV cache that hold something else than they should: NaN, infinities, random bits.

Whose pages they are may get any answer. Everybody else gets the tokens that they would have got.
"""

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SHORT = {"min_tokens": 16, "recent_tokens": 8, "ratio": 0.1}
ALONE = {"speculative_config": None}
SETTINGS = {
    "sketch": (SHORT | {"method": "sketch", "draft_ratio": 0.2}, {}),
    "sketch alone": (SHORT | {"method": "sketch"}, ALONE),
    "sketch with shared budgets": (SHORT | {"method": "sketch", "shared_budget": "layers"}, {}),
    "specattn": (SHORT | {"method": "specattn"}, {}),
    "sts": (SHORT | {"method": "sts"}, {}),
    "vegas": (SHORT | {"method": "vegas", "crossover_tokens": 0}, {}),
    "dense": (SHORT | {"method": "dense", "sparse_draft": True}, {}),
}
# A page that is poisoned must not come back as the prefix of another request: that would be a right answer to it.
SHAPE = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 512, "enable_prefix_caching": False}
LENGTHS, NEW_TOKENS = (110, 70, 130, 50), 14
VICTIM = 1


def nothing(pages: torch.Tensor) -> None:
    pages.fill_(float("nan"))


def infinite(pages: torch.Tensor) -> None:
    pages.fill_(float("inf"))


def random_bits(pages: torch.Tensor) -> None:
    """Of keys, of values, and of the codes beside them."""
    generator = torch.Generator().manual_seed(0)
    pages.view(torch.int32).random_(-(2**31), 2**31, generator=generator)


class Engine:
    """An engine with the pages of its KV cache, by who holds them."""

    def __init__(self, llm) -> None:
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        self.run = llm.llm_engine
        self.manager = self.run.engine_core.engine_core.scheduler.kv_cache_manager
        self.requests = self.run.engine_core.engine_core.scheduler.requests
        layers = get_layers_from_vllm_config(self.run.vllm_config, AttentionLayerBase)
        self.caches = [layer.kv_cache for layer in layers.values()]

    def held_by(self, name: str) -> list[int]:
        [whole] = [found for found in self.requests if found.rpartition("-")[0] == name]
        return sorted({block for ids in self.manager.get_block_ids(whole) for block in ids})

    def free(self) -> list[int]:
        return [block.block_id for block in self.manager.block_pool.blocks if not block.ref_cnt and not block.is_null]

    def poison(self, blocks: list[int], how) -> None:
        for cache in self.caches:
            pages = cache[blocks]
            how(pages)
            cache[blocks] = pages

    def tokens(self, prompts: list[dict], before_step=lambda number: None) -> dict[str, list[int]]:
        """Greedy tokens of all requests, by name; `before_step` is called with the number of steps so far."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        for number, prompt in enumerate(prompts):
            self.run.add_request(str(number), prompt, parameters)
        found, steps = {}, 0
        while self.run.has_unfinished_requests():
            before_step(steps)
            for output in self.run.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
            steps += 1
            assert steps < 60 * len(prompts), f"stuck: {found}"
        return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_pages_that_do_not_fit_harm_nobody_else(setting, engine, prompts):
    options, arguments = SETTINGS[setting]
    llm = engine(options, **SHAPE | arguments)
    at, given = Engine(llm), prompts(LENGTHS)
    wanted = at.tokens(given)
    assert all(len(tokens) == NEW_TOKENS for tokens in wanted.values())

    # Pages of nobody. A page that somebody gets is poisoned until it is written, token by token.
    for how in (nothing, random_bits):
        found = at.tokens(given, lambda _, how=how: at.poison(at.free(), how))
        assert found == wanted, f"somebody reads pages that are nobody's: {how.__name__}"

    others = {name: tokens for name, tokens in wanted.items() if name != str(VICTIM)}
    for how in (nothing, infinite, random_bits):
        hit = []

        def spoil(number: int, how=how, hit=hit) -> None:
            if number >= 2 and any(name.rpartition("-")[0] == str(VICTIM) for name in at.requests):
                at.poison(at.held_by(str(VICTIM)), how)
                hit.append(number)

        found = at.tokens(given, spoil)
        assert len(hit) >= 2, "the request ended before anything was done to it"
        harmed = found.pop(str(VICTIM))
        assert found == others, f"{how.__name__} in the pages of one request changes another"
        assert len(harmed) == NEW_TOKENS
        assert harmed != wanted[str(VICTIM)], f"{how.__name__}: nothing was done to the request"

    assert at.tokens(given) == wanted, "something is left of what was done"

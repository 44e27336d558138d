"""Similarities of layers and heads and the maps made of them against plain references, and the calibration script on a
tiny pair."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from specattn_vllm.calibration import (  # noqa: E402
    EPSILON,
    HEAD_SIMILARITIES,
    HeadSimilarity,
    Similarity,
    head_jaccard,
    head_map,
    head_overlap,
    layer_similarity,
    monotone_map,
)

SCRIPTS = Path(__file__).parents[1] / "scripts"


def distributions(layers, lengths, keys, seed):
    """Causal attention rows: [layers, len(lengths), keys], each a distribution over its first `length` keys."""
    scores = 3 * torch.randn(layers, len(lengths), keys, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.arange(keys) >= lengths[:, None], float("-inf")).softmax(-1)


def test_similarity_is_minus_kl_over_the_visible_keys():
    lengths = torch.tensor([1, 5, 12])
    a, b = distributions(3, lengths, 12, 0), distributions(2, lengths, 12, 1)
    want = np.zeros((3, 2))
    for j, i, r in itertools.product(range(3), range(2), range(3)):
        keys = int(lengths[r])
        p, q = ((x[:keys].double().numpy() + EPSILON) / (1 + EPSILON * keys) for x in (a[j, r], b[i, r]))
        want[j, i] -= (p * np.log(p / q)).sum()
    np.testing.assert_allclose(layer_similarity(a, b, lengths).numpy(), want, rtol=1e-9)


def test_equal_layers_score_zero_and_others_less():
    lengths = torch.tensor([4, 9])
    found = layer_similarity(a := distributions(3, lengths, 9, 2), a, lengths)
    assert torch.allclose(found.diagonal(), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert (found[~torch.eye(3, dtype=torch.bool)] < -0.01).all()


def test_a_zero_of_the_draft_costs_a_finite_amount():
    lengths = torch.tensor([2])
    sure, other = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert layer_similarity(sure, other, lengths).item() == pytest.approx(np.log(EPSILON), rel=1e-3)


def test_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match="differ"):
        layer_similarity(torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.tensor([3, 3]))


def test_accumulator_is_the_mean_over_all_queries():
    lengths = torch.tensor([2, 3, 7, 8, 8])
    a, b = distributions(2, lengths, 8, 3), distributions(4, lengths, 8, 4)
    accumulator = Similarity(2, 4)
    with pytest.raises(ValueError, match="no queries"):
        accumulator.mean()
    accumulator.add(a[:, :2], b[:, :2], lengths[:2])
    accumulator.add(a[:, 2:], b[:, 2:], lengths[2:])
    assert accumulator.queries == 5
    assert torch.allclose(accumulator.mean(), layer_similarity(a, b, lengths) / 5)


@pytest.mark.parametrize("ties", [False, True])
def test_map_against_all_monotone_maps(ties):
    rng = np.random.default_rng(0)
    for m, n in itertools.product(range(1, 6), range(1, 5)):
        for _ in range(20):
            s = rng.integers(-2, 1, (m, n)).astype(float) if ties else -rng.exponential(size=(m, n))
            every = list(itertools.combinations_with_replacement(range(n), m))
            totals = {layers: sum(s[j, i] for j, i in enumerate(layers)) for layers in every}
            found = monotone_map(s.tolist())
            assert tuple(found) in totals, "not monotone"
            assert totals[tuple(found)] == pytest.approx(max(totals.values()))
            if ties:
                best = [layers for layers, total in totals.items() if total == max(totals.values())]
                assert tuple(found) == min(best, key=lambda layers: layers[::-1])


def test_map_of_a_tensor_and_of_nonsense():
    assert monotone_map(torch.eye(3)) == [0, 1, 2]
    assert monotone_map(-torch.ones(4, 3)) == [0, 0, 0, 0]
    for bad in ([], [[]], [[1.0], [1.0, 2.0]], [[float("nan")]]):
        with pytest.raises(ValueError):
            monotone_map(bad)


def test_overlap_is_what_two_heads_agree_on():
    lengths = torch.tensor([1, 5, 12])
    a, b = distributions(3, lengths, 12, 0), distributions(2, lengths, 12, 1)
    want = [[np.minimum(p.numpy(), q.numpy()).sum(dtype=float) for q in b] for p in a]
    np.testing.assert_allclose(head_overlap(a, b, lengths).numpy(), want, rtol=1e-6)
    assert torch.allclose(head_overlap(a, a, lengths).diagonal(), torch.full((3,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("top", [1, 4, 12, 50])
def test_jaccard_is_that_of_the_most_attended_keys(top):
    lengths = torch.tensor([2, 5, 12])
    a, b = distributions(3, lengths, 12, 2), distributions(2, lengths, 12, 3)

    def best(row, keys):
        return set(sorted(range(keys), key=lambda k: -row[k])[:top])

    want = np.zeros((3, 2))
    for h, d, r in itertools.product(range(3), range(2), range(3)):
        p, q = (best(x[r].tolist(), int(lengths[r])) for x in (a[h], b[d]))
        want[h, d] += len(p & q) / len(p | q)
    np.testing.assert_allclose(head_jaccard(a, b, lengths, top).numpy(), want, rtol=1e-9)


@pytest.mark.parametrize("kind", HEAD_SIMILARITIES)
def test_head_similarity_is_the_mean_over_all_queries_of_every_pair_of_layers(kind):
    lengths = torch.tensor([2, 100, 90, 128])
    a = torch.stack([distributions(3, lengths, 128, seed) for seed in (0, 1)])
    b = torch.stack([distributions(2, lengths, 128, seed) for seed in (2, 3, 4)])
    accumulator = HeadSimilarity(kind)
    with pytest.raises(ValueError, match="no queries"):
        accumulator.mean()
    accumulator.add(a[:, :, :1], b[:, :, :1], lengths[:1])
    accumulator.add(a[:, :, 1:], b[:, :, 1:], lengths[1:])
    found = accumulator.mean()
    assert found.shape == (2, 3, 3, 2) and (found > 0).all() and (found < 1).all()
    for j, i in itertools.product(range(2), range(3)):
        want = HEAD_SIMILARITIES[kind](a[j], b[i], lengths) / 4
        torch.testing.assert_close(found[j, i], want)


def test_head_map_takes_the_most_similar_and_of_equals_the_first():
    similarity = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.5, 0.4], [0.0, 0.0, 0.0]])
    assert head_map(similarity) == [1, 0, 0]


def test_head_map_within_ranks_stays_there():
    similarity = torch.tensor([[0.1, 0.2, 0.3, 0.9], [0.9, 0.2, 0.3, 0.9], [0.9, 0.1, 0.2, 0.3], [0.1, 0.9, 0.3, 0.2]])
    assert head_map(similarity) == [3, 0, 0, 1]
    assert head_map(similarity, ranks=2) == [1, 0, 3, 2]
    assert head_map(similarity, ranks=4) == [0, 1, 2, 3]
    assert head_map(similarity[:, :2], ranks=2) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="3 ranks do not divide 4 target heads and 4 draft heads"):
        head_map(similarity, ranks=3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a target and a draft with random weights, and a corpus directory."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("pair")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator([], tokenizers.trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<|bos|>", "<|eos|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    for name, layers in (("target", 3), ("draft", 2)):
        torch.manual_seed(layers)
        config = transformers.LlamaConfig(
            vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, bos_token_id=0, eos_token_id=1, initializer_range=0.3)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / name)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<|bos|>").save_pretrained(root / name)
    package = root / "corpus" / "pack1"
    package.mkdir(parents=True)
    for k in range(6):
        (package / f"m{k}.py").write_text("".join(f"def f_{k}_{i}():\n    return {i * 7 + k}\n" for i in range(80)))
    return root


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("calibrate_demo_map", SCRIPTS / "calibrate_demo_map.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])  # the script puts its folder there, which other tests must not see
        spec.loader.exec_module(module)
    return module


def test_captured_rows_are_those_of_eager_attention(script, pair):
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(script.ROWS, capture := script.RowCapture())
    ids = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(0))
    queries = torch.tensor([0, 3, 20, 39])

    def load(implementation):
        return AutoModelForCausalLM.from_pretrained(
            pair / "target", dtype=torch.float32, attn_implementation=implementation).eval()

    with torch.inference_mode():
        found = capture.run(load(script.ROWS), ids, queries)
        eager = load("eager")(input_ids=ids[None], output_attentions=True).attentions
    # Four query heads share two KV heads.
    want = torch.stack([layer[0].unflatten(0, (2, 2)).mean(1)[:, queries] for layer in eager])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


def test_script_writes_a_map_the_loader_takes_and_repeats_it(script, pair, tmp_path):
    layer_map = pytest.importorskip("specattn_vllm.layer_map")
    texts = []
    for name in ("one.json", "two.json"):
        run(script, pair, tmp_path / name)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1].replace("two.json", "one.json")
    data = json.loads(texts[0])
    assert list(data) == ["schema", "method", "calibrated", "target", "draft", "layers", "heads", "provenance"]
    assert data["layers"][0] is None and data["heads"] is None
    assert data["layers"][1:] == monotone_map(data["provenance"]["similarity"][1:])
    assert data["provenance"]["tokens"] == 1024 and data["provenance"]["windows"] == 4
    assert str(pair) not in texts[0]
    read = layer_map.read(tmp_path / "one.json")
    assert read.calibrated and read.target.num_hidden_layers == 3


@pytest.mark.parametrize("kind", HEAD_SIMILARITIES)
def test_script_writes_a_head_map_that_follows_from_what_it_measured(script, pair, tmp_path, kind):
    layer_map = pytest.importorskip("specattn_vllm.layer_map")
    texts = []
    for name in ("one.json", "two.json"):
        run(script, pair, tmp_path / name, "--method", "sts", "--head-similarity", kind)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1].replace("two.json", "one.json")
    data = json.loads(texts[0])
    found = data["provenance"]["heads"]
    assert (data["method"], found["similarity"], found["ranks"]) == ("sts", kind, 1)
    assert data["layers"][0] is data["heads"][0] is found["values"][0] is None
    for heads, values in zip(data["heads"][1:], found["values"][1:], strict=True):
        assert heads == [row.index(max(row)) for row in values]
        assert all(0 < value < 1 for row in values for value in row)
    # Layers are compared as for any map.
    run(script, pair, tmp_path / "layers.json")
    plain = json.loads((tmp_path / "layers.json").read_text())
    assert (plain["layers"], plain["provenance"]["similarity"]) == (data["layers"], data["provenance"]["similarity"])
    read = layer_map.read(tmp_path / "one.json")
    assert [row and list(row) for row in read.heads] == data["heads"]
    assert layer_map.resolve(str(tmp_path / "one.json"), read.target, read.draft, method="sts") == read


def test_script_keeps_heads_within_ranks(script, pair, tmp_path):
    run(script, pair, tmp_path / "ranks.json", "--method", "sts", "--ranks", "2")
    assert json.loads((tmp_path / "ranks.json").read_text())["heads"] == [None, [0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ranks", "2"), "are for --method sts"),
        (("--head-similarity", "jaccard"), "are for --method sts"),
        (("--method", "sts", "--ranks", "3"), "3 ranks do not divide"),
    ],
)
def test_script_refuses_what_makes_no_sense(script, pair, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        run(script, pair, tmp_path / "never.json", *more)


def run(script, pair, out: Path, *more: str) -> None:
    script.main(["--target", str(pair / "target"), "--draft", str(pair / "draft"), "--corpus", str(pair / "corpus"),
                 "--out", str(out), "--tokens", "1000", "--window", "256", "--queries", "16", *more])

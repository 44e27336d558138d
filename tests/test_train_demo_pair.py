"""The training script of the demo pair: end to end on a CPU with tiny sizes, and the separation of held-out text."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPTS = Path(__file__).parents[1] / "scripts" / "models"
ON_PATH = [str(SCRIPTS), str(SCRIPTS.parent / "lib")]
"""As when a script is run."""
OUTPUT = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "training.json",
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*ON_PATH, *sys.path])  # other tests must not see it
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load("train_demo_pair")


@pytest.fixture(scope="module")
def demo_corpus():
    return load("demo_corpus")


def source(seed, count=60):
    """Python text that no two seeds share and that no filter drops."""
    return "".join(
        f"def function_{seed}_{i}(value_{seed}):\n    return value_{seed} + {seed * 31 + i}\n\n" for i in range(count)
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, demo_corpus):
    """Packages, partly barred: held out by name, copied or edited from the standard library, present twice."""
    root = tmp_path_factory.mktemp("corpus")
    held_name = next(f"pack{i}" for i in range(1000) if demo_corpus.is_held_out_package(f"pack{i}"))
    free_name = next(f"pack{i}" for i in range(1000) if not demo_corpus.is_held_out_package(f"pack{i}"))
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = {f"{free_name}/sub/m{i}.py": source(i) for i in range(20)}
    files |= {
        f"{free_name}/sub/zz_twice.py": source(0),
        f"{held_name}/secret.py": source(900),
        f"{free_name}/copied_secret.py": source(900),
        f"{free_name}/textwrap.py": (stdlib / "textwrap.py").read_text(),
        f"{free_name}/backport.py": "# a line of one's own\n" + (stdlib / "heapq.py").read_text(),
        f"{free_name}/table.py": "DATA = '" + "x" * 5000 + "'\n",
        f"{free_name}/short.py": "x = 1\n",
        f"{free_name}/__pycache__/cached.py": source(901),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / free_name / "latin.py").write_bytes(b"# caf\xe9\n" + source(902).encode())
    return root, free_name, held_name


def test_held_out_text_never_reaches_training(demo_corpus, corpus):
    root, free_name, held_name = corpus
    training, held, facts = demo_corpus.collect_corpus([root])
    files = [f for document in training for f in document]
    joined = "".join(files)
    assert sorted(f.split("\n")[0] for f in files) == sorted(f"# file: {free_name}/sub/m{i}.py" for i in range(20))
    for barred in ("function_900_", "function_901_", "function_902_", "class TextWrapper", "def heapify", "xxxxx"):
        assert barred not in joined
    assert facts["held_out_packages"] == [held_name]
    assert facts["dropped_files"] == {"same_as_held_out": 2, "mostly_standard_library": 1, "duplicate": 1}
    held_text = "".join(f for document in held for f in document)
    assert "class TextWrapper" in held_text and "# file: test/" not in held_text


def test_batches_shift_by_one_and_cover_an_epoch():
    stream = torch.arange(100, 1000, dtype=torch.int16)
    data = load("demo_training").batches(stream, batch=2, context=16, bos=7, seed=0)
    seen = []
    for _ in range(20):
        x, y = next(data)
        assert x.shape == y.shape == (2, 16)
        assert (x[:, 0] == 7).all() and (x[:, 1:] == y[:, :-1]).all()
        seen += y[:, 0].tolist()
    assert len(set(seen)) == len(seen)  # no window twice before the epoch ends


def test_agreement_and_acceptance_are_one_and_five_for_a_pair_of_equals(script):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=32,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    args = script.parse_args(["--out", "x", "--tiny", "--context", "32", "--eval-windows", "3"])
    stream = torch.randint(2, 64, (200,), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    found = load("demo_evaluation").evaluate(model, model, stream, args, "cpu")
    assert found["positions"] == 96 and found["agreement"] == 1.0
    assert found["expected_tokens_per_step_k4"] == 5.0
    assert found["target_loss"] == found["draft_loss"] == found["target_loss_by_position"]["0-32"]


def test_a_pair_over_the_size_limit_is_refused(script, corpus, tmp_path):
    with pytest.raises(SystemExit, match="more than --max-mb"):
        script.main(["--out", str(tmp_path), "--tiny", "--corpus", str(corpus[0]), "--max-mb", "0.1", "--vocab", "300"])


def run(*args):
    # One thread: on a busy machine of few cores, threads that wait for each other take many times as long.
    # -P: the script must find the files beside it without Python's help.
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPTS / "train_demo_pair.py"), "--tiny", "--vocab", "300", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_end_to_end_in_two_calls(corpus, tmp_path, script):
    first, second = tmp_path / "first", tmp_path / "second"
    run("--out", first, "--corpus", corpus[0], "--seconds-draft", 0)
    assert {p.name for p in (first / "target").iterdir()} == OUTPUT
    second_call = ["--tiny", "--vocab", "300", "--out", second, "--corpus", corpus[0], "--target", first / "target"]
    script.main([*map(str, second_call)])
    for kind in ("target", "draft"):
        folder = second / kind
        assert {p.name for p in folder.iterdir()} == OUTPUT
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16 and model.config.vocab_size == 300
        assert model.config.architectures == ["LlamaForCausalLM"] and model.config.tie_word_embeddings
        assert (model.config.num_key_value_heads, model.config.head_dim) == (2, 64)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer("def f(x):\n")["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
        assert tokenizer.decode(ids[1:]) == "def f(x):\n"
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "def f("}], tokenize=False)
        assert chat == "<|bos|>def f("
        record = json.loads((folder / "training.json").read_text())
        curve = [point["loss"] for point in record["training"]["curve"]]
        assert curve[-1] < curve[0] - 0.3
        assert record["training"]["distilled"] == (kind == "draft")
        assert record["megabytes"] * 1e6 == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.2)
        assert 0 <= record["evaluation"]["agreement"] <= 1
        assert "Held-out loss" in (folder / "README.md").read_text()
    weights = [(out / "target" / "model.safetensors").read_bytes() for out in (first, second)]
    assert weights[0] == weights[1]
    assert (second / "target" / "tokenizer.json").read_bytes() == (second / "draft" / "tokenizer.json").read_bytes()

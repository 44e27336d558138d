"""The training of a draft: its loss, its start, and the script end to end with tiny sizes."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers

OUTPUT = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}


def llama(hidden: int):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=hidden,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
        )
    )


def test_the_loss_in_parts_has_the_gradients_of_the_whole(script):
    torch.manual_seed(0)
    target, draft = llama(48).eval(), llama(32)
    tokens = torch.randint(0, 97, (3, 25))
    loss = script("distil_training").distil(draft, target, tokens, rows=16)  # 75 rows: the last part is shorter
    found = [parameter.grad.clone() for parameter in draft.parameters()]
    draft.zero_grad()
    logits, wanted = draft(tokens).logits.log_softmax(-1), target(tokens).logits.detach().log_softmax(-1)
    whole = F.kl_div(logits.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    for gradient, parameter in zip(found, draft.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_embedding_starts_on_the_principal_directions_of_the_targets(script):
    principal = script("distil_training").principal
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(50, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    found = principal(low_rank, 4)  # rank 4: nothing is lost
    torch.testing.assert_close(found @ found.T, low_rank @ low_rank.T, rtol=1e-4, atol=1e-4)
    lengths = found.norm(dim=0)
    assert (lengths[:-1] >= lengths[1:]).all()


def test_a_wider_draft_than_the_target_is_refused(script):
    with pytest.raises(SystemExit, match="--hidden 64: at most the target's 48"):
        script("distil_training").draft_config(llama(48).config, SimpleNamespace(hidden=64))


@pytest.fixture
def run(script, texts, target, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging, "disable_progress_bar", lambda: None)  # of other tests' process

    def distil(name, *arguments):
        out = tmp_path / name
        script("distil_draft").main(
            ["--tiny", "--out", str(out), "--target", str(target), "--roots", str(texts), "--device", "cpu", *arguments]
        )
        return out

    return distil


def test_end_to_end_the_same_draft_from_the_same_seed(run, target, capsys):
    first, second, other = run("first"), run("second"), run("other", "--seed", "1")
    assert {path.name for path in first.iterdir()} == OUTPUT
    weights = [(out / "model.safetensors").read_bytes() for out in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (target / name).read_bytes()

    draft = transformers.AutoModelForCausalLM.from_pretrained(first)
    wanted = transformers.AutoConfig.from_pretrained(target)
    for name in ("vocab_size", "max_position_embeddings", "rope_parameters", "bos_token_id", "eos_token_id"):
        assert getattr(draft.config, name) == getattr(wanted, name)
    assert draft.dtype == torch.bfloat16 and draft.config.tie_word_embeddings and draft.config.num_hidden_layers == 1

    record = json.loads((first / "training.json").read_text())
    curve = [point["kl"] for point in record["training"]["curve"]]
    assert record["training"]["steps"] == 12 and curve[-1] < curve[0]
    assert set(record["evaluation"]) == {"prose", "code", "chat"}
    card = (first / "README.md").read_text()
    assert "# Draft model for tiny" in card and "| chat |" in card
    assert capsys.readouterr().out.endswith(f"{other}\n")


def test_without_steps_the_minutes_end_a_run(run):
    record = json.loads((run("short", "--steps", "0", "--minutes", "0.005") / "training.json").read_text())
    assert 1 <= record["training"]["steps"] < 1000


def test_text_that_is_missing_and_folders_in_use_are_said(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="found 0 files to train on and 0 held out: name folders"):
        run("draft", "--roots", str(tmp_path / "empty"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(SystemExit):
        run("used")
    assert "is not empty: name another folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("draft", "--target", str(tmp_path))
    assert "run scripts/real_model" in capsys.readouterr().err

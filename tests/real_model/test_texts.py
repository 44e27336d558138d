"""The texts of the real model: what is held out, what a document is, and that a second run writes the same."""

import json

import pytest
from transformers import AutoTokenizer

from specattn_vllm.evaluation.texts import documents, files

TOKENS = 1500


@pytest.fixture
def corpus(script, texts, target, tmp_path):
    def run(name="texts", *arguments):
        out = tmp_path / name
        script("real_corpus").main(
            [
                str(out),
                "--model",
                str(target),
                "--roots",
                str(texts),
                "--documents",
                "2",
                "--tokens",
                str(TOKENS),
                *arguments,
            ]
        )
        return out

    return run


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_documents_are_held_out_long_enough_and_the_same_each_time(corpus, script, texts, target):
    out = corpus()
    assert contents(out) == contents(corpus("again"))
    record = json.loads((out / "texts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    real_text = script("real_text")
    by_name = {file.name: file for file in real_text.find([texts])}
    kinds = [document["kind"] for document in record["documents"]]
    assert sorted(set(kinds)) == ["chat", "code", "prose"]
    for document in record["documents"]:
        assert len(tokenizer((out / document["file"]).read_text()).input_ids) == document["tokens"] >= TOKENS
        assert all(by_name[source["file"]].held_out for source in document["made_of"])


def test_the_evaluation_reads_them_one_file_a_document(corpus, target):
    out = corpus()
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    paths = sorted(out.glob("*/*.txt"))
    found = documents(files(paths), lambda text: tokenizer(text, verbose=False).input_ids, TOKENS, len(paths))
    assert [document.name for document in found] == [path.name for path in paths]


def test_chats_answer_with_the_text_and_ask_about_what_was_shown_before(script, texts):
    real_text, chats = script("real_text"), script("real_chats")
    files = [file for file in real_text.find([texts]) if file.kind == "prose"][:6]
    talk = chats.conversation(files, lambda messages: len(messages) >= 30)
    assert [m["role"] for m in talk] == ["user", "assistant"] * 15
    source = "\n\n".join(file.text for file in files)
    for message in talk[1::2]:
        assert all(line.strip() in source for line in message["content"].splitlines())
    questions = [m["content"] for m in talk[::2]]
    assert sum(q.startswith("This is from") for q in questions) >= 5
    recalls = [q for q in questions if q.startswith(("In alpha/", "Repeat the part of alpha/"))]
    assert len(recalls) >= 3 and not any("\n\n" in q for q in recalls)  # the text itself is not shown again
    assert talk == chats.conversation(files, lambda messages: len(messages) >= 30)


def test_training_leaves_out_what_is_held_out_and_edited_copies_of_it(script, texts):
    real_text = script("real_text")
    files = real_text.find([texts])
    held = [file for file in files if file.held_out]
    assert 0 < len(held) < len(files) / 8
    copy = held[0]._replace(name="copy.rst", text="A line of one's own.\n" + held[0].text)
    assert not copy.held_out
    learnt = real_text.training([*files, copy])
    assert {file.name for file in learnt} == {file.name for file in files if not file.held_out}


@pytest.mark.parametrize(
    ("name", "text", "kept"),
    [
        ("words.txt", "alpha\nbeta\n" * 200, False),  # a list of words
        ("table.rst", "1 2 3 4 5 6 7 8 9 0 and more\n" * 60, False),
        ("prose.md", "This line has words enough to be a sentence.\n" * 40, True),
        ("short.md", "This line has words enough to be a sentence.\n" * 4, False),
        ("table.py", "DATA = [0x1, 0x2, 0x3, 0x4]\n" * 60, False),
        ("code.c", "int twice(int value) {\n    return value + value;\n}\n" * 40, True),
        ("picture.svg", "This line has words enough to be a sentence.\n" * 40, False),
    ],
)
def test_what_counts_as_text(script, tmp_path, name, text, kept):
    (tmp_path / name).write_text(text)
    assert bool(script("real_text").find([tmp_path])) == kept


def test_metadata_of_a_package_begins_behind_its_fields(script, tmp_path):
    (tmp_path / "some.dist-info").mkdir()
    body = "This line has words enough to be a sentence.\n" * 40
    (tmp_path / "some.dist-info/METADATA").write_text("Name: some\nVersion: 1\n\n" + body)
    (found,) = script("real_text").find([tmp_path])
    assert (found.kind, found.package, found.text) == ("prose", "some.dist-info", body)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "10000000"), "makes no prose of 10,000,000 tokens: name more --roots"),
        (("--model", "absent"), None),
    ],
)
def test_too_little_text_and_an_absent_model_are_said(corpus, capsys, arguments, message):
    with pytest.raises(SystemExit, match=message):
        corpus("texts", *arguments)
    assert message or "run scripts/real_model" in capsys.readouterr().err


def test_texts_of_two_runs_do_not_mix(corpus, capsys):
    corpus()
    with pytest.raises(SystemExit):
        corpus()
    assert "is not empty: name another folder" in capsys.readouterr().err

"""Documents of an evaluation: what they are made of, and how long they are."""

from __future__ import annotations

import pytest

from specattn_vllm.evaluation import texts
from specattn_vllm.evaluation.job import text_tokens
from specattn_vllm.installed import UserError


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_a_document_is_a_file_s_beginning_and_short_files_are_joined():
    given = [("long", "abcdefgh"), ("short", "12"), ("next", "345"), ("unread", "xyzxyz")]
    found = texts.documents(given, letters, 6, 2)
    assert [document.name for document in found] == ["long", "short + next"]
    assert [document.ids for document in found] == [letters("abcdef"), letters("12\n\n34")]


def test_too_little_text_is_refused_with_how_much_it_makes():
    with pytest.raises(UserError, match="the text makes 1 documents of 6 tokens, not --documents 2"):
        texts.documents([("long", "abcdefgh"), ("short", "12")], letters, 6, 2)


def test_the_digest_tells_documents_apart():
    first, second = (texts.Document("same", ids).digest for ids in ([1, 2], [1, 3]))
    assert first != second
    assert first == texts.Document("other", [1, 2]).digest


def test_the_held_out_text_is_there():
    found = dict(texts.held_out())
    assert len(found) >= 24
    assert all(len(text) > 20_000 for text in found.values())


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b"\xff\xfe", "is not text in UTF-8")])
def test_a_file_that_cannot_be_read_is_refused(content, message, tmp_path):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(texts.files([path]))


@pytest.mark.parametrize(
    ("positions", "tokens"), [(10, 100 + 1 + 10 + 4), (11, 100 + 1 + 15 + 4), (1, 100 + 1 + 5 + 4)]
)
def test_a_document_is_long_enough_for_whole_rounds_and_the_last_drafts(positions, tokens, job):
    assert text_tokens(100, positions, 4) == tokens
    assert job(positions=positions).max_model_len >= tokens

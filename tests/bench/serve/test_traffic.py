"""What is asked of each server: how it is read, and what is refused."""

from __future__ import annotations

import argparse
import random
from collections import Counter

import pytest

from specattn_vllm import cli
from specattn_vllm.bench.serve.traffic import lengths_name, mixed, parse_lengths


def test_lengths_have_shares():
    lengths = parse_lengths("1k:0.5, 8K:0.3,100:0.2")
    assert lengths == {1024: 0.5, 8192: 0.3, 100: 0.2}
    assert lengths_name(lengths) == "50% 1k, 30% 8k, 20% 100"
    assert parse_lengths("1k,2k") == {1024: 0.5, 2048: 0.5}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1k:0.5,8k:0.4", "add up to 0.9"),
        ("1k:0.5,8k", "write TOKENS:SHARE"),
        ("1k:0.5,1024:0.5", "twice"),
        ("1k:x", "write TOKENS:SHARE"),
        ("1k:0,2k:1", "write TOKENS:SHARE"),
        ("0:1", "write TOKENS:SHARE"),
        ("long", "write TOKENS:SHARE"),
    ],
)
def test_lengths_that_are_refused(text, why):
    with pytest.raises(argparse.ArgumentTypeError, match=why):
        parse_lengths(text)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--request-rate 0", "0: a rate is requests per second"),
        ("--request-rate nan", "nan: a rate is"),
        ("--request-rate fast", "fast: a rate is"),
        ("--rate 1,1.0", "names one twice"),
        ("--goodput itl:5", "names are ttft, tpot, e2el"),
        ("--goodput ttft:soon", "write NAME:MS"),
        ("--burstiness 0", "a number above 0"),
        ("--modes plain,magic", "'magic' is no mode: choose from plain, draft-v2"),
        ("--output-len 1", "at least 2"),
        ("--lengths 1k:2", "write TOKENS:SHARE"),
    ],
)
def test_arguments_that_are_refused(words, why, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "serve", *words.split()])
    assert stop.value.code == 2
    assert why in capsys.readouterr().err


def test_of_each_length_as_many_as_its_share_and_at_least_one():
    lengths = {1024: 0.5, 8192: 0.3, 32768: 0.2}
    assert Counter(mixed(lengths, 10, random.Random(0))) == {1024: 5, 8192: 3, 32768: 2}
    assert Counter(mixed(lengths, 3, random.Random(0))) == {1024: 1, 8192: 1, 32768: 1}
    assert Counter(mixed({10: 0.99, 20: 0.01}, 20, random.Random(0))) == {10: 19, 20: 1}
    assert mixed(lengths, 50, random.Random(1)) == mixed(lengths, 50, random.Random(1))
    assert mixed(lengths, 50, random.Random(1)) != mixed(lengths, 50, random.Random(2))

"""How far a run is, in words."""

from __future__ import annotations

import pytest

from specattn_vllm.tools import remaining
from specattn_vllm.tools.interrupts import resumed


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (89 * 60, "89 min"), (11_100, "3 h 5 min")]
)
def test_durations(seconds, text):
    assert remaining.duration(seconds) == text


def test_the_rest_takes_as_long_as_what_was(monkeypatch):
    clock = iter([0.0, 60.0, 90.0])
    monkeypatch.setattr(remaining.time, "monotonic", lambda: next(clock))
    run = remaining.Remaining("setting", 4)
    assert [run.begin(), run.begin()] == ["setting 1 of 4", "setting 2 of 4"]
    assert run.end() == "1 of 4 done, about 3 min left"
    # Two at a time: what has passed is shared.
    assert run.end() == "2 of 4 done, about 2 min left"
    monkeypatch.setattr(remaining.time, "monotonic", lambda: 100.0)
    assert run.end() and run.end() == ""


def test_the_command_that_goes_on_throws_nothing_away():
    argv = ["bench", "--option", "a=b c", "--overwrite"]
    assert resumed("--resume", argv=argv) == "specattn bench --option 'a=b c' --resume"

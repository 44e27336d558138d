"""What an exception says in one line: its first cause, and of a list of reasons the reasons."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from specattn_vllm.causes import LONGEST, of_log, summary
from specattn_vllm.installed import UserError


def raised(make) -> BaseException:
    try:
        make()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


class Length(BaseModel):
    tokens: int = 0

    @model_validator(mode="after")
    def fits(self):
        if self.tokens > 5:
            raise ValueError("more than the model\nhas: use 5")
        return self


def test_reasons_stand_before_their_heading():
    error = ValueError("cannot serve this:\n  target: no window\n  LoRA: merge it\n")
    assert summary(error) == "target: no window; LoRA: merge it (ValueError: cannot serve this)"


def test_the_first_cause_stands_before_what_it_led_to():
    def fail():
        try:
            raise OSError("disk is full")
        except OSError as error:
            raise RuntimeError("engine did not start\nsee above") from error

    assert summary(raised(fail)) == "OSError: disk is full (which led to RuntimeError: engine did not start)"


def test_what_was_only_handled_meanwhile_is_no_cause():
    def fail():
        try:
            raise OSError("disk is full")
        except OSError:
            raise RuntimeError("no engine") from None

    assert summary(raised(fail)) == "RuntimeError: no engine"


@pytest.mark.parametrize(
    ("given", "text"),
    [({"tokens": 9}, "more than the model has: use 5"), ({"tokens": "x"}, "tokens: Input should be a valid integer")],
)
def test_of_a_validation_what_is_wrong_is_told(given, text):
    error = raised(lambda: Length(**given))
    assert isinstance(error, ValidationError)
    assert summary(error).startswith(text) and "pydantic.dev" not in summary(error)


def test_one_without_a_message_has_its_name():
    assert summary(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert summary(ValueError("only a heading:")) == "ValueError: only a heading:"


def test_an_error_of_the_user_is_told_without_its_class():
    assert summary(UserError("vllm serve: no such\nargument")) == "vllm serve: no such argument"


def test_it_is_never_endless():
    assert len(summary(ValueError("x" * 5000))) == LONGEST


def test_of_a_validation_error_what_is_wrong_is_reported():
    log = """INFO 11-22 all is well
    ValueError: within a line of a traceback
(EngineCore pid=7) pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig
(EngineCore pid=7)   Value error, K is too large: use less [type=value_error, input_value=1]
(EngineCore pid=7)     For further information visit https://errors.pydantic.dev
RuntimeError: Engine core initialization failed."""
    assert of_log(log).startswith("Value error, K is too large: use less")
    assert of_log("INFO 11-22 all is well") is None


def test_of_a_refusal_its_reasons_are_reported():
    log = """(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1] Traceback (most recent call last):
specattn_vllm.checks.UnsupportedError: --attention-backend specattn cannot serve this:
  target: head size 32 is not supported; 64 and 128 are
  LoRA: serve merged weights
RuntimeError: Engine core initialization failed."""
    assert of_log(log) == (
        "target: head size 32 is not supported; 64 and 128 are; LoRA: serve merged weights (UnsupportedError: "
        "--attention-backend specattn cannot serve this)"
    )

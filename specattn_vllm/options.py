"""The plugin's options: one frozen model, read from vLLM's own `--additional-config '{"specattn": {...}}'`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError, field_validator, model_validator

from specattn_vllm import methods, misplaced, option_rules, presets
from specattn_vllm.option_fields import OptionFields

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "specattn"


class OptionsError(ValueError):
    """An option that cannot be used; the message names key, value, what is allowed and the remedy."""


class SpecAttnOptions(OptionFields):
    """How the KV entries that verification reads are chosen, checked. Counts are in tokens."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, data: Any) -> Any:
        return presets.apply(data) if isinstance(data, dict) else data

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        return methods.find(value).name

    @field_validator("dense_layers")
    @classmethod
    def _no_negative_layers(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(layer < 0 for layer in value):
            raise ValueError("layers are counted from 0")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> SpecAttnOptions:
        option_rules.check(self)
        return self

    @classmethod
    def parse(cls, raw: Any) -> SpecAttnOptions:
        """Validate the value of the `specattn` key; raises OptionsError with one line per problem."""
        if not isinstance(raw, dict):
            raise OptionsError(
                f"additional_config['{KEY}'] is {raw!r}; it must be an object such as "
                f'{{"top_p": 0.9}} (--additional-config \'{{"{KEY}": {{"top_p": 0.9}}}}\')'
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            lines = [_explain(problem) for problem in error.errors()]
            raise OptionsError("specattn options (--additional-config):\n  " + "\n  ".join(lines)) from None

    @classmethod
    def from_vllm(cls, vllm_config: VllmConfig) -> SpecAttnOptions:
        """The options of an engine that uses our backend."""
        return cls.from_additional(vllm_config.additional_config)

    @classmethod
    def from_additional(cls, config: Any) -> SpecAttnOptions:
        """The options in an `--additional-config`, for our backend; the one place where they are read."""
        refuse_misplaced(config, ours=True)
        return cls.parse(config.get(KEY, {}) if isinstance(config, dict) else {})


def refuse_misplaced(config: Any, *, ours: bool) -> None:
    """Raise OptionsError for options that were meant for us and would not reach us."""
    if found := misplaced.in_config(config, KEY, SpecAttnOptions.model_fields, ours=ours):
        raise OptionsError("--additional-config:\n  " + "\n  ".join(found))


def _explain(problem: dict) -> str:
    """One pydantic error as: key, value, what is allowed, remedy."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = ", ".join(SpecAttnOptions.model_fields)
        return f"{key}: unknown option; known: {known}. Remove it or correct its name."
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    name = str(problem["loc"][0])
    return f"{key} = {problem['input']!r}: {message}. {name}: {SpecAttnOptions.model_fields[name].description}"

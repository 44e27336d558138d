"""The plugin's options, read from vLLM's own `--additional-config '{"specattn": {...}}'`.

Each method has a pydantic model of its own (`Method.options`). It extends `SpecAttnOptions`, often through a base class
that methods share (`methods/budget.py`, `methods/by_draft.py`, `methods/self_draft.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from specattn_vllm import data_file, misplaced

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from vllm.config import VllmConfig

    from specattn_vllm.methods.base import Method

KEY = "specattn"
MOST = 20
"""Problems that one error tells."""

SINKS, SOFT_CAP = "attention sinks", "a soft cap on logits"
"""Parts of attention that some methods do not compute, as errors name them."""

ExecutorName = Literal["auto", "torch", "triton", "fa3", "xformers"]


def for_researchers(default: Any, **field: Any) -> Any:
    """A field for studies of a method. Servers should keep its default."""
    return Field(default, json_schema_extra={"for": "researchers"}, **field)


class OptionsError(ValueError):
    """An option cannot be used. The message names the key, the value, the allowed values and the remedy."""


class SpecAttnOptions(BaseModel):
    """Options that every method has, and properties that every method's options answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(description="Who selects the tokens that are read. `specattn methods` lists them.")
    preset: Literal["paper"] | None = for_researchers(
        None,
        description="'paper': the published setting of the method. Options that are set explicitly take precedence.",
    )
    executor: ExecutorName = Field(
        "auto",
        description="Which code runs attention and selection: 'fa3' (FlashAttention 3, Hopper GPUs), 'triton' (CUDA "
        "GPUs; a CPU through Triton's interpreter), 'xformers' (NVIDIA GPUs, whole blocks) or 'torch' (CPU). 'auto' "
        "takes 'fa3' on a GPU where it runs and else 'triton', and 'torch' on a CPU.",
    )
    stats_interval_s: float = Field(60.0, gt=0.0, description="Seconds between two statistics lines in the log.")

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        inside = value if isinstance(value, list | tuple) else [value]
        if annotation is not bool and any(isinstance(one, bool) for one in inside):
            raise ValueError("true and false are no numbers")
        return value

    @classmethod
    def parse(cls, raw: Any) -> SpecAttnOptions:
        """Options from the value of the `specattn` key, for the method that `raw` names. Raises OptionsError with one
        line per problem."""
        if not isinstance(raw, dict):
            raise OptionsError(
                f"additional_config['{KEY}'] is {raw!r}; it must be an object such as "
                f'{{"ratio": 0.125}} (--additional-config \'{{"{KEY}": {{"ratio": 0.125}}}}\')'
            )
        from specattn_vllm import methods

        try:
            method = methods.find(raw.get("method", methods.DEFAULT))
            paper = methods.published(method) if raw.get("preset") == "paper" else {}
            found = method.options.model_validate({"method": method.name, **paper, **raw})
        except ValidationError as error:
            problems = error.errors()
            lines = [_explain(problem, method) for problem in problems[:MOST]]
            if len(problems) > MOST:
                lines.append(f"and {len(problems) - MOST:,} other problems")
        except ValueError as error:
            lines = [str(error)]
        else:
            if isinstance(found, SpecAttnOptions):
                return found
            lines = [f"method {method.name!r}: its options are a {type(found).__name__}: make them a SpecAttnOptions"]
        raise OptionsError("specattn options (--additional-config):\n  " + "\n  ".join(lines))

    @classmethod
    def from_vllm(cls, vllm_config: VllmConfig) -> SpecAttnOptions:
        """The options of an engine that uses our backend."""
        return cls.from_additional(vllm_config.additional_config)

    @classmethod
    def from_additional(cls, config: Any) -> SpecAttnOptions:
        """The options in an `--additional-config`, for an engine that uses our backend. Only this function reads
        them."""
        refuse_misplaced(config, ours=True)
        return cls.parse(config.get(KEY, {}) if isinstance(config, dict) else {})

    @property
    def kind(self) -> Method:
        """The description of the method."""
        from specattn_vllm import methods

        return methods.find(self.method)

    @property
    def usable(self) -> frozenset[str]:
        """Names of the options that have an effect, given the values of the others."""
        return frozenset(type(self).model_fields)

    @property
    def amount(self) -> str:
        """The budget in words, for the metric label `budget`."""
        return "of the method"

    @property
    def needs_token_pages(self) -> bool:
        """Whether some selection is made of single tokens of single heads. An executor that reads whole blocks cannot
        serve it."""
        return self.kind.needs_token_pages

    @property
    def sparse_readers(self) -> tuple[str, ...]:
        """What reads a part of its cache: 'verification', 'drafting', or both."""
        return self.kind.readers

    @property
    def cannot_have(self) -> tuple[str, ...]:
        """Of SINKS and SOFT_CAP, what the method does not compute."""
        return ()

    @property
    def audited(self) -> float:
        """Share of the pairs of layer and request whose selection is audited."""
        return 0.0

    @property
    def searched_bits(self) -> int:
        """Bits per element of the sketch that the target searches; 0 if it searches none."""
        return 0

    @property
    def sketch_bits_in_cache(self) -> int:
        """Bits per element of the sketches in the cache; 0 if the cache has no room for sketches."""
        return 0

    @property
    def speculator(self) -> str:
        """Import path of the class that replaces vLLM's draft-model speculator."""
        return self.kind.speculator

    def draft_model(self, target: str, given: str | None) -> str | None:
        """The draft model of an engine that is given this target, and this draft model or none."""
        return given

    def refusals(self, config: VllmConfig) -> Iterator[str]:
        """Reasons why the method cannot serve an engine, each with its remedy. Called before a model is loaded."""
        return iter(())

    def crossover(self, executor: str) -> int:
        """Context tokens of a batch below which the target is dense; for a lossless method, below which drafting is
        dense. It is the method's number for this executor, else 0."""
        return self.kind.crossover.get(executor, 0)


def refuse_misplaced(config: Any, *, ours: bool) -> None:
    """Raise OptionsError for options that were meant for this plugin but stand where it does not read them."""
    from specattn_vllm.methods import METHODS

    if found := misplaced.in_config(config, KEY, owners(), METHODS, ours=ours):
        raise OptionsError("--additional-config:\n  " + "\n  ".join(found))


def owners() -> dict[str, list[str]]:
    """Option -> the methods that have it."""
    from specattn_vllm import methods

    found: dict[str, list[str]] = {}
    for method in methods.METHODS.values():
        for name in method.options.model_fields:
            found.setdefault(name, []).append(method.name)
    return found


def _explain(problem: ErrorDetails, method: Method) -> str:
    """One pydantic error as text: key, value, allowed values, remedy."""
    key = ".".join(str(part) for part in problem["loc"])
    fields = method.options.model_fields
    if problem["type"] == "extra_forbidden":
        if others := owners().get(key):
            return (
                f"{key} = {misplaced.shown(problem['input'])}: method {method.name!r} has no such option. Remove it, "
                f"or set method to one that has it: {', '.join(others)}"
            )
        return f"{data_file.plain(key)}: unknown option; known: {', '.join(fields)}. Remove it or correct its name."
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    name = str(problem["loc"][0])
    return f"{key} = {misplaced.shown(problem['input'])}: {message}. {name}: {fields[name].description}"

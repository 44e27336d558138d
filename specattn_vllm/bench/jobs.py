"""From what is asked for to one job per engine: exact vLLM arguments and environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from specattn_vllm.bench.grid import (
    ACCEPTANCE_LENGTH,
    ALONE_MODES,
    DRAFT_TOKENS,
    EAGLE_MODES,
    KEPT_MODES,
    OUR_MODES,
    SELF_MODES,
    SKETCH_MODES,
    Cell,
    generated_tokens,
    prompt_tokens,
    slack_tokens,
)
from specattn_vllm.bench.schema import Job, JobCell
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.tools.models import Shape

Device = Literal["cuda", "cpu"]
SPARSE_DRAFT = 0.1
"""Share of the context that draft steps read in mode 'sparse-draft'."""


@dataclass(frozen=True)
class Request:
    """What the user asks for; one job per mode, per kept fraction of the modes that keep one, and per acceptance length
    of those that speculate."""

    shape: Shape
    grid: Sequence[Cell]
    modes: Sequence[str]
    kept: Sequence[float]
    device: Device = "cuda"
    draft_tokens: int = DRAFT_TOKENS
    acceptance_lengths: Sequence[float] = (ACCEPTANCE_LENGTH,)
    """Mean tokens of a round; 0: what the models agree on."""
    draft_tokens_of: Mapping[str, int] = field(default_factory=dict)
    acceptance_lengths_of: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Where a mode ('vegas'), or an engine ('vegas 10%'), has others than those for all."""
    output_tokens: int = 64
    repeats: int = 3
    max_warmups: int = 5
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.92
    capture_sizes: Sequence[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Of the plugin, for our modes."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of vllm.LLM for every mode, over those made here."""
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What all engines of one report have in common: figures that differ in it stand in no common table."""
        return {
            "shape": self.shape.name,
            "shape_description": self.shape.description,
            "grid": [str(cell) for cell in self.grid],
            "device": self.device,
            "draft_tokens": self.draft_tokens,
            "acceptance_length": self._acceptance_lengths(),
            "output_tokens": self.output_tokens,
            "seed": self.seed,
        }

    def _acceptance_lengths(self) -> float | list[float] | None:
        lengths = list(self.acceptance_lengths)
        return lengths if len(lengths) > 1 else lengths[0] or None


def make_jobs(request: Request) -> list[Job]:
    jobs = []
    for mode in request.modes:
        for kept in request.kept if mode in KEPT_MODES else (None,):
            lengths = _own(request.acceptance_lengths_of, job_name(mode, kept), mode, request.acceptance_lengths)
            if mode in ALONE_MODES:
                lengths = (0,)
            for length in lengths:
                jobs.append(_job(request, mode, kept, length, length_name(length) if len(lengths) > 1 else ""))
    used = {name for job in jobs for key in job.options for name in (key, f"{job.mode}:{key}")}
    if unused := [key for key in request.options if key not in used]:
        raise ValueError(f"--option {unused[0]}: no mode of this run has a use for it (--modes; docs/options.md)")
    return jobs


def job_name(mode: str, kept: float | None) -> str:
    return mode if kept is None else f"{mode} {kept * 100:g}%"


def length_name(length: float) -> str:
    """What tells engines of several acceptance lengths apart."""
    return f", {length:g} a round" if length else ", as the models agree"


def _job(request: Request, mode: str, kept: float | None, acceptance_length: float, suffix: str) -> Job:
    name = job_name(mode, kept)
    draft_tokens = _own(request.draft_tokens_of, name, mode, request.draft_tokens)
    generated = generated_tokens(request.output_tokens, draft_tokens)
    # Prompts are the same for every mode, speculating or not, so they leave room for the one that drafts most.
    most = max([request.draft_tokens, *request.draft_tokens_of.values()])
    room = generated_tokens(request.output_tokens, most)
    cells = [
        JobCell(
            name=str(cell),
            batch=cell.batch,
            prompt_tokens=prompt_tokens(cell, room, most, request.shape.max_position),
        )
        for cell in request.grid
    ]
    speculates = mode not in ALONE_MODES
    arguments = _engine_arguments(request, mode, cells, generated, draft_tokens)
    if speculates:
        arguments["speculative_config"] = _speculation(mode, draft_tokens, acceptance_length)
    if mode in OUR_MODES:
        arguments["attention_backend"] = "specattn"
        arguments["additional_config"] = {"specattn": options_of(mode, kept, request.options)}
    return Job(
        name=name + suffix,
        mode=mode,
        kept=kept,
        shape=request.shape.name,
        cells=cells,
        engine_arguments=arguments | request.engine_options,
        environment=_environment(request, mode),
        draft_tokens=draft_tokens if speculates else 0,
        acceptance_length=(acceptance_length or None) if speculates else None,
        generated_tokens=generated,
        repeats=request.repeats,
        max_warmups=request.max_warmups,
        seed=request.seed,
    )


def _own(values: Mapping[str, Any], name: str, mode: str, common: Any) -> Any:
    return values.get(name, values.get(mode, common))


def _environment(request: Request, mode: str) -> dict[str, str | None]:
    environment: dict[str, str | None] = {
        # Of runner V1 there is nothing but the draft mode that asks for it: everything else is compared on V2.
        "VLLM_USE_V2_MODEL_RUNNER": "0" if mode == "draft-v1" else "1",
        # Stock vLLM without hooks of this package: an empty name matches no plugin.
        "VLLM_PLUGINS": "specattn" if mode in OUR_MODES else "",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if request.device == "cpu":
        from specattn_vllm import cpu_runner

        # PYTHONPATH and the cache's size are this machine's affair; the worker adds them (`runner`).
        environment |= {k: v for k, v in cpu_runner.environment({}).items() if k == "TRITON_INTERPRET"}
    return environment


def _engine_arguments(
    request: Request, mode: str, cells: Sequence[JobCell], generated: int, draft_tokens: int
) -> dict[str, Any]:
    """What stock vLLM and ours have in common."""
    longest = max(cell.prompt_tokens for cell in cells)
    arguments: dict[str, Any] = {
        "model": "{target}",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "max_num_seqs": max(cell.batch for cell in cells),
        "max_model_len": longest + generated + slack_tokens(draft_tokens),
        "max_num_batched_tokens": request.max_num_batched_tokens,
        "seed": request.seed,
    }
    if not request.shape.has_weights:
        arguments["load_format"] = "dummy"
    if request.device == "cpu":
        arguments |= {"dtype": "float32", "enforce_eager": True, "distributed_executor_backend": "uni"}
    else:
        arguments |= {"dtype": "bfloat16", "gpu_memory_utilization": request.gpu_memory_utilization}
        sizes = request.capture_sizes or capture_sizes(mode, [cell.batch for cell in cells], draft_tokens)
        arguments["compilation_config"] = {"cudagraph_capture_sizes": list(sizes)}
    return arguments


def _speculation(mode: str, draft_tokens: int, acceptance_length: float) -> dict[str, Any]:
    speculation = {
        "model": "{target}" if mode in SELF_MODES else "{eagle}" if mode in EAGLE_MODES else "{draft}",
        "method": "eagle3" if mode in EAGLE_MODES else "draft_model",
        "num_speculative_tokens": draft_tokens,
    }
    if acceptance_length:
        # vLLM then accepts drafts at random, so that a round gives so many tokens on average whatever the models say:
        # random weights agree on nothing, and what agreement a method costs is not a matter of speed.
        speculation |= {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": acceptance_length,
        }
    return speculation


def _options(mode: str, kept: float | None) -> dict[str, Any]:
    if mode == "dense":
        return {"method": "dense"}
    if mode == "sparse-draft":
        return {"method": "dense", "sparse_draft": True, "draft_ratio": SPARSE_DRAFT, "min_tokens": 0}
    if mode in SKETCH_MODES:
        return {"method": "sketch", "ratio": kept, "min_tokens": 0}
    if mode in SELF_MODES:
        return {"method": mode, "ratio": kept, "min_tokens": 0}
    # A fixed share, whatever the (random) attention looks like: top_p keeps everything, the cap cuts it.
    return {
        "method": "specattn", "top_p": 1.0, "max_fraction": kept, "min_tokens": 0, "layer_map": "uniform"
    }  # fmt: skip


def options_of(mode: str, kept: float | None, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a mode with those given: 'KEY' is for all modes that can use it, 'MODE:KEY' for one, and goes
    before the other."""
    options = _options(mode, kept)
    own = {key.removeprefix(f"{mode}:"): value for key, value in given.items() if key.startswith(f"{mode}:")}
    usable = SpecAttnOptions.parse(options | own).usable
    options |= {key: value for key, value in given.items() if key in usable} | own
    SpecAttnOptions.parse(options)  # an engine would refuse them too, but after minutes
    return options


def capture_sizes(mode: str, batches: Sequence[int], draft_tokens: int) -> list[int]:
    """Sizes of CUDA graphs, in tokens, that the grid's batches need.

    A plain step has a token per request, a verification K + 1. On runner V1 the draft model runs in graphs of these
    sizes as well: K + 2 tokens per request in its first step, and one in the others; what is no multiple of K + 1 is
    rounded up here, because vLLM rounds it too and then drops what exceeds the largest size given.
    """
    if mode in ALONE_MODES:
        return sorted(set(batches))
    verified = draft_tokens + 1
    wanted = [batch * verified for batch in batches]
    if mode == "draft-v1":
        wanted += [tokens for batch in batches for tokens in (batch, batch * (draft_tokens + 2))]
    return sorted({-(-tokens // verified) * verified for tokens in wanted})

"""Modes, their arguments on the command line, and from what is asked for to one job per engine: exact vLLM arguments
and environment."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from specattn_vllm.bench import sizes
from specattn_vllm.bench.schema import CellResult, Job, OfEngine
from specattn_vllm.installed import UserError
from specattn_vllm.options import SpecAttnOptions
from specattn_vllm.tools.arguments import at_least, parse_list, parse_option, share
from specattn_vllm.tools.models import EAGLE, Shape

DRAFT_TOKENS = 5
ACCEPTANCE_LENGTH = 3.5
T = TypeVar("T")


class Mode(NamedTuple):
    title: str
    drafter: str | None
    """Which model drafts, 'target' where it drafts for itself; None: no speculation."""
    options: Mapping[str, Any] | None = None
    """Of the plugin; None: stock vLLM."""
    kept: str | None = None
    """The option that is the share of the context that is kept, with an engine for each; None: nothing is left out."""
    by_default: bool = True
    """Whether it is measured where no mode is named. Others need a shape with a head of EAGLE-3's, or an acceptance of
    their own: a draft model's says nothing about a target that drafts for itself."""


SKETCH = {"method": "sketch", "min_tokens": 0}
# A fixed share, whatever the (random) attention looks like: top_p keeps everything, the cap cuts it.
BY_DRAFT = {"method": "specattn", "top_p": 1.0, "min_tokens": 0, "layer_map": "uniform"}
MODES = {
    "plain": Mode("plain decoding", None),
    "draft-v2": Mode("draft model, runner V2", "draft"),
    "draft-v1": Mode("draft model, runner V1", "draft"),
    "eagle": Mode("EAGLE-3 head", "eagle", by_default=False),
    "dense": Mode("dense", "draft", {"method": "dense"}),
    "specattn": Mode("specattn", "draft", BY_DRAFT, "max_fraction"),
    "sketch": Mode("sketch", "draft", SKETCH, "ratio"),
    "sketch-eagle": Mode("sketch-eagle", "eagle", SKETCH, "ratio", by_default=False),
    "sketch-alone": Mode("sketch-alone", None, SKETCH, "ratio", by_default=False),
    "vegas": Mode("vegas", "target", {"method": "vegas", "min_tokens": 0}, "ratio", by_default=False),
}
DEFAULT_MODES = tuple(name for name, mode in MODES.items() if mode.by_default)


def parse_mode(text: str) -> str:
    """'draft' is the one whose runner vLLM takes by itself."""
    text = "draft-v2" if text == "draft" else text
    if text not in MODES:
        raise argparse.ArgumentTypeError(f"'{text}' is no mode: choose from {', '.join(MODES)}")
    return text


def parse_for_mode(parse: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    """A parser of 'VALUE', for all modes, and 'MODE:VALUE', for one that speculates: 'vegas:4' -> ('vegas', 4), '4' ->
    ('', 4)."""
    modes = [name for name, mode in MODES.items() if mode.drafter]

    def convert(text: str) -> tuple[str, T]:
        mode, sign, value = text.rpartition(":")
        if sign and mode not in modes:
            raise argparse.ArgumentTypeError(f"'{mode}' is no mode that speculates: {', '.join(modes)}")
        try:
            return mode, parse(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not VALUE or MODE:VALUE, e.g. 4 or vegas:4") from None

    return convert


def add_modes(
    group: argparse._ArgumentGroup,
    modes: Sequence[str],
    told: str,
    kept: str | None,
    length: Callable[[str], Any],
    lengths: str,
) -> None:
    """`--modes`, with its default and help, and what is said of each: `--kept`, with its default, `--draft-tokens`,
    `--acceptance-length`, with its parser and help, and `--option`."""
    told, default = f"{told} [%(default)s]", ",".join(modes)
    group.add_argument("--modes", type=parse_list(parse_mode), default=default, metavar="MODE,...", help=told)
    told = "shares of the context that modes of this plugin but dense keep, each measured by itself "
    told += "[the method's own]" if kept is None else "[%(default)s]"
    group.add_argument("--kept", type=parse_list(share), default=kept, metavar="SHARE,...", help=told)
    more: dict[str, Any] = {"action": "append", "default": []}
    told = f"drafted a round, in all modes or in one; may be repeated [{DRAFT_TOKENS}]"
    group.add_argument("--draft-tokens", type=parse_for_mode(at_least(1)), metavar="[MODE:]K", help=told, **more)
    told = f"{lengths}, of all modes or of one; may be repeated [{ACCEPTANCE_LENGTH:g}]"
    group.add_argument("--acceptance-length", type=parse_for_mode(length), metavar="[MODE:]A", help=told, **more)
    told = "an option of the plugin for its modes that can use it, e.g. min_tokens=64, or for one, e.g. "
    told += "vegas:dilation=0; may be repeated"
    group.add_argument("--option", type=parse_option, metavar="[MODE:]KEY=VALUE", help=told, **more)


def device(args: argparse.Namespace, shape: Shape | None, part: str) -> str:
    """What engines run on; random weights of large models only on a GPU, unless `--device cpu` says otherwise."""
    from specattn_vllm.tools.provenance import has_gpu

    large = shape is not None and not shape.has_weights
    if args.device == "cuda" and not args.list and not has_gpu():
        raise UserError("--device cuda: no NVIDIA GPU was found: leave it out, or ask `specattn info` what is there")
    if args.device != "auto":
        return args.device
    if (args.list and large) or has_gpu():
        return "cuda"
    if large:
        raise UserError(
            f"no NVIDIA GPU was found, and {shape.name} is too large for a CPU: try `specattn bench {part}`, or insist "
            "with --device cpu (--shape tiny is for that)"
        )
    return "cpu"


def settings_of(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """What all engines of one report have in common: figures that differ in it stand in no common table."""
    lengths = dict(args.acceptance_length).get("", [ACCEPTANCE_LENGTH])
    return {
        "shape": shape.name,
        "shape_description": shape.description,
        "grid": [str(cell) for cell in args.grid],
        "device": args.device,
        "draft_tokens": dict(args.draft_tokens).get("", DRAFT_TOKENS),
        "acceptance_length": lengths if len(lengths) > 1 else lengths[0],
        "output_tokens": args.output_tokens,
    }


def make_jobs(args: argparse.Namespace, shape: Shape) -> list[Job]:
    """One per mode, per kept share of the modes that keep one, and per acceptance length of those that speculate, from
    the arguments of `specattn bench engines` with a device. ValueError where they ask for what no engine would do."""
    drafted = by_mode(args, "draft-tokens", DRAFT_TOKENS)
    lengths = by_mode(args, "acceptance-length", [ACCEPTANCE_LENGTH])
    jobs = []
    for mode, kept in each_mode(args):
        own = lengths.get(mode, lengths[""]) if MODES[mode].drafter else (None,)
        for length in own:
            name = name_of(mode, kept) + ("" if len(own) == 1 else f", {length:g} a round")
            jobs.append(_job(args, shape, name, mode, kept, drafted, length))
    refuse_unused_options(args, jobs)
    return jobs


def by_mode(args: argparse.Namespace, flag: str, default: Any) -> dict[str, Any]:
    """The values of `--flag [MODE:]VALUE`, the one for all modes under ''. ValueError for a mode that does not run."""
    found = {"": default} | dict(getattr(args, flag.replace("-", "_")))
    if unknown := found.keys() - {"", *args.modes}:
        raise ValueError(f"--{flag} {unknown.pop()}: no such mode in this run (--modes)")
    return found


def each_mode(args: argparse.Namespace) -> list[tuple[str, float | None]]:
    """Modes, those that keep a share of the context with each that is asked for; None: the method's own, or all."""
    return [(mode, kept) for mode in args.modes for kept in (args.kept if MODES[mode].kept else None) or (None,)]


def name_of(mode: str, kept: float | None) -> str:
    return mode if kept is None else f"{mode} {kept * 100:g}%"


def refuse_unused_options(args: argparse.Namespace, jobs: Sequence[OfEngine]) -> None:
    """ValueError for an `--option` that no job has."""
    used = {name for job in jobs for key in job.options for name in (key, f"{job.mode}:{key}")}
    if unused := [key for key, _ in args.option if key not in used]:
        raise ValueError(f"--option {unused[0]}: no mode of this run has a use for it (--modes; docs/options.md)")


def check_drafter(mode: str, shape: Shape) -> None:
    """ValueError for a mode whose drafter the shape does not have."""
    drafter = MODES[mode].drafter
    if drafter in (EAGLE, "draft") and drafter not in shape.configs:
        missing = "head of EAGLE-3's" if drafter == EAGLE else "draft model"
        can = ",".join(
            name for name in ("plain", "sketch", "sketch-alone") if MODES[name].drafter in (None, *shape.configs)
        )
        raise ValueError(f"--modes {mode}: the shape {shape.name} has no {missing}: give --modes {can}")


def _job(
    args: argparse.Namespace,
    shape: Shape,
    name: str,
    mode: str,
    kept: float | None,
    drafted: Mapping[str, int],
    length: float | None,
) -> Job:
    """Of one engine; `drafted` has the tokens of a round by mode, '' for all others."""
    check_drafter(mode, shape)
    drafter, options = MODES[mode].drafter, MODES[mode].options
    draft_tokens = drafted.get(mode, drafted[""])
    # Prompts are the same for every mode, speculating or not, so they leave room for the one that drafts most.
    most = max(drafted.values())
    room = shape.max_position - sizes.generated_tokens(args.output_tokens, most) - sizes.slack_tokens(most)
    generated = sizes.generated_tokens(args.output_tokens, draft_tokens)
    cells = [CellResult(name=str(c), batch=c.batch, prompt_tokens=sizes.prompt_tokens(c, room)) for c in args.grid]
    arguments: dict[str, Any] = {
        "model": "{target}",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "max_num_seqs": max(cell.batch for cell in cells),
        "max_model_len": max(cell.prompt_tokens for cell in cells) + generated + sizes.slack_tokens(draft_tokens),
        "max_num_batched_tokens": 8192,
        "seed": 0,
    }
    if not shape.has_weights:
        arguments["load_format"] = "dummy"
    if args.device == "cpu":
        arguments |= {"dtype": "float32", "enforce_eager": True, "distributed_executor_backend": "uni"}
    else:
        graphs = sizes.graph_tokens(drafter, mode == "draft-v1", [cell.batch for cell in cells], draft_tokens)
        arguments |= {"dtype": "bfloat16", "gpu_memory_utilization": args.gpu_memory_utilization}
        arguments["compilation_config"] = {"cudagraph_capture_sizes": graphs}
    if drafter:
        arguments["speculative_config"] = speculation(name, drafter, draft_tokens, length)
    if options is not None:
        arguments |= backend(mode, options, kept, dict(args.option))
    return Job(
        name=name,
        mode=mode,
        kept=kept,
        shape=shape.name,
        cells=cells,
        engine_arguments=arguments | dict(args.engine_argument),
        environment=environment(mode) | {"HF_HUB_OFFLINE": "1"},
        on_cpu=args.device == "cpu",
        draft_tokens=draft_tokens if drafter else 0,
        acceptance_length=length,
        generated_tokens=generated,
        repeats=args.repeats,
        max_warmups=args.max_warmups,
    )


def speculation(name: str, drafter: str, draft_tokens: int, length: float | None) -> dict[str, Any]:
    """vLLM's configuration of speculation, of a job of this name. `length`: mean tokens of a round; None: the models'
    own."""
    found = {
        "model": f"{{{drafter}}}",
        "method": "eagle3" if drafter == "eagle" else "draft_model",
        "num_speculative_tokens": draft_tokens,
    }
    if length is None:
        return found
    if not 1 <= length <= draft_tokens + 1:
        most = draft_tokens + 1
        raise ValueError(f"--acceptance-length {length:g} for {name}: between 1 and --draft-tokens + 1 = {most}")
    # vLLM then accepts drafts at random, so that a round gives so many tokens on average whatever the models say:
    # random weights agree on nothing, and what agreement a method costs is not a matter of speed.
    return found | {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": length}


def backend(mode: str, options: Mapping[str, Any], kept: float | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an engine of a mode that runs on this plugin, with these options and those given: 'KEY' is for
    all modes that can use it, 'MODE:KEY' for one, and goes before the other."""
    options = {**options} | ({} if kept is None else {MODES[mode].kept: kept})
    own = {key.removeprefix(f"{mode}:"): value for key, value in given.items() if key.startswith(f"{mode}:")}
    usable = SpecAttnOptions.parse(options | own).usable
    options |= {key: value for key, value in given.items() if key in usable} | own
    SpecAttnOptions.parse(options)  # an engine would refuse them too, but after minutes
    return {"attention_backend": "specattn", "additional_config": {"specattn": options}}


def environment(mode: str) -> dict[str, str]:
    """Variables of an engine's process."""
    return {
        # Of runner V1 there is nothing but the draft mode that asks for it: everything else is compared on V2.
        "VLLM_USE_V2_MODEL_RUNNER": "0" if mode == "draft-v1" else "1",
        # Stock vLLM without hooks of this package: an empty name matches no plugin.
        "VLLM_PLUGINS": "" if MODES[mode].options is None else "specattn",
        "VLLM_NO_USAGE_STATS": "1",
    }

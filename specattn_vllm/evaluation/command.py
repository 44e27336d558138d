"""The command line of `specattn eval`. Loads transformers and vLLM where they are used."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn_vllm.installed import UserError, require
from specattn_vllm.tools.arguments import add_engine, add_numbers, add_pair, add_running
from specattn_vllm.tools.interrupts import ended_as_interrupted, resumed, status_of
from specattn_vllm.tools.outputs import fitted, shown

if TYPE_CHECKING:
    from specattn_vllm.evaluation.job import Job
    from specattn_vllm.evaluation.schema import Setting

MEASURING = ("torch", "transformers", "vllm", "numpy")
"""Modules that measuring takes; tables and pages of what was measured take less."""
LED = ("draft_model", "eagle", "eagle3", "mtp")
"""vLLM's drafters whose every draft is sampled where `forcing.py` can take the text's token instead."""


def methods_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is compared")
    add_pair(what)
    told = '[{"name": ..., "options": {...}}, ...] in the place of ours'
    what.add_argument("--settings", type=Path, metavar="FILE.json", help=told)
    told = "the pair's, for all settings whose selections come from a draft model and that name none themselves"
    what.add_argument("--layer-map", type=Path, metavar="FILE.json", help=told)
    told = "this setting, beside dense; may be repeated"
    what.add_argument("--only", action="append", default=[], metavar="NAME", help=told)
    text = parser.add_argument_group("the text")
    told = (
        "documents; short ones are strung together [Python's standard library, which the demo pair was not trained on]"
    )
    text.add_argument("--text", type=Path, nargs="+", metavar="FILE", help=told)
    add_numbers(
        text,
        ("documents", 8, 1, "how many"),
        ("context", 4096, 1, "tokens before the first scored one"),
        ("positions", 512, 1, "scored in each document"),
    )
    how = parser.add_argument_group("the engines")
    add_numbers(
        how,
        ("draft-tokens", 4, 1, "drafted a round"),
        ("batch", 8, 1, "documents at a time"),
        ("free-tokens", 128, 2, "generated freely after each prompt, for the acceptance length"),
    )
    how.add_argument("--dtype", help="[float32 on a CPU, bfloat16 on a GPU]")
    add_engine(how, "for every setting")
    add_running(parser.add_argument_group("running"), "settings", Path("specattn-eval.json"), resume=False)


def table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--against", metavar="NAME", help="also the differences from this setting, paired by document")


def methods(args: argparse.Namespace) -> int:
    from specattn_vllm.evaluation.settings import chosen, default_settings, read_settings, with_layer_map

    given = read_settings(args.settings) if args.settings else default_settings(args.context)
    if args.layer_map is not None:
        given = with_layer_map(given, args.layer_map)
    settings = chosen(given, args.only)
    if args.list:
        for setting in settings:
            more = setting.model_dump(exclude={"name"}, exclude_defaults=True)
            print(f"{setting.name}\n  {json.dumps(setting.options if more.keys() == {'options'} else more)}")
        return 0

    require(MEASURING)
    from specattn_vllm.evaluation import runner
    from specattn_vllm.evaluation.report import markdown
    from specattn_vllm.evaluation.results import Report
    from specattn_vllm.tools.provenance import provenance

    setup, jobs = plan(args, settings)
    results = [] if args.overwrite else runner.earlier(args.out, setup)
    report = Report(provenance=provenance(args.commit), setup=setup, results=results)
    order = [setting.name for setting in given]
    try:
        with ended_as_interrupted():
            failed = runner.run_all(jobs, report, args.out, order, gpus=args.gpus)
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted; this goes on after the settings in {args.out}: {resumed()}")
        return status_of(interrupt)
    if report.dense is not None:
        print("\n" + fitted(markdown(report)))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def plan(args: argparse.Namespace, settings: list[Setting]) -> tuple[dict[str, Any], list[Job]]:
    """What all settings share, as the report tells it, and a job for each."""
    from specattn_vllm.evaluation import models, texts
    from specattn_vllm.evaluation.job import Job, text_tokens
    from specattn_vllm.tools.models import model_folder
    from specattn_vllm.tools.provenance import has_gpu

    engine_options = dict(args.engine_argument)
    if "kv_cache_dtype" in engine_options:
        raise UserError(
            "--engine-argument kv_cache_dtype: it would be that of the reference too, and reports would not tell it; "
            'give a setting of --settings "fp8_cache": true (docs/evaluation.md#settings)'
        )
    refuse_graphs_with_baselines(engine_options, settings)
    device = args.device if args.device != "auto" else ("cuda" if has_gpu() else "cpu")
    names = {"target": args.target, "draft": args.draft}
    folders = {role: model_folder(role, name) for role, name in names.items()}
    common = {
        "models": {role: models.identity(role, names[role], folder) for role, folder in folders.items()},
        "draft_tokens": args.draft_tokens,
        "device": device,
        "dtype": args.dtype or ("float32" if device == "cpu" else "bfloat16"),
        "engine_options": engine_options,
    }
    refuse_what_cannot_be_led(engine_options, args.draft_tokens)
    length = text_tokens(args.context, args.positions, args.draft_tokens)
    source = texts.files(args.text) if args.text else texts.held_out()
    check_room(args, folders["target"], common)
    tokenizer = models.tokenizer_of(folders["target"])
    documents = texts.documents(source, lambda text: tokenizer(text, verbose=False).input_ids, length, args.documents)
    common |= {"context": args.context, "positions": args.positions, "free_tokens": args.free_tokens}
    ids = [document.ids for document in documents]
    jobs = [Job(setting=setting, documents=ids, batch=args.batch, **folders, **common) for setting in settings]
    named = [{"name": document.name, "sha256": document.digest} for document in documents]
    return common | {"documents": named}, jobs


def refuse_graphs_with_baselines(engine_options: dict[str, Any], settings: list[Setting]) -> None:
    baselines = [setting.name for setting in settings if setting.baseline is not None]
    if baselines and engine_options.get("enforce_eager") is False:
        raise UserError(
            f"--engine-argument enforce_eager=false: {baselines[0]!r} is a baseline, which waits for the device in "
            "each layer and runs in engines without graphs; leave the argument out, or the baselines (--only)"
        )


def check_room(args: argparse.Namespace, target: str, common: dict[str, Any]) -> None:
    """Documents fit in the target's positions, as far as its configuration tells them: vLLM says it after minutes, and
    in other words."""
    from specattn_vllm.evaluation.job import positions_needed
    from specattn_vllm.evaluation.models import positions_of

    there = positions_of(target)
    if there is None or "max_model_len" in common["engine_options"]:
        return
    needed = positions_needed(args.context, args.positions, args.draft_tokens, args.free_tokens)
    if needed > there:
        most = there - (needed - args.context)
        way_out = f"--context {most} is the most with these" if most > 0 else "ask for fewer --positions"
        raise UserError(
            f"--context {args.context} with --positions {args.positions} and --free-tokens {args.free_tokens} takes "
            f"{needed:,} positions, and {common['models']['target']['name']} has {there:,}: {way_out}"
        )


def refuse_what_cannot_be_led(engine_options: dict[str, Any], draft_tokens: int) -> None:
    """A drafter in the place of --draft may be one that engines cannot be led with (`forcing.py`): refused before any
    engine starts."""
    if "speculative_config" not in engine_options:
        return
    given = engine_options["speculative_config"]
    if not isinstance(given, dict):
        raise UserError(
            f"--engine-argument speculative_config={json.dumps(given)}: engines are led round by round, and without a "
            "drafter there are no rounds; leave it out (--draft drafts), or ask a server (docs/evaluation.md, Tasks)"
        )
    # Without a method vLLM tells it from the model.
    method = given.get("method") or "draft_model"
    if method not in LED and not method.endswith("mtp"):
        raise UserError(
            f"--engine-argument speculative_config with method {method!r}: its drafts are not sampled token by token "
            f"from a model, so they cannot be the text's; take one of {', '.join(map(repr, LED))}, leave it out "
            "(--draft drafts), or ask a server (docs/evaluation.md, Tasks)"
        )
    if given.get("num_speculative_tokens", draft_tokens) != draft_tokens:
        raise UserError(
            f"--engine-argument speculative_config with num_speculative_tokens {given['num_speculative_tokens']}, and "
            f"--draft-tokens {draft_tokens}: rounds have one length, give the same"
        )


def table(args: argparse.Namespace) -> None:
    require(("numpy",))
    from specattn_vllm.evaluation import report as tables
    from specattn_vllm.evaluation.results import read

    report = read(args.file)
    with shown(args.file):
        made = [tables.markdown(report), *([tables.differences(report, args.against)] if args.against else ())]
    print("\n".join(map(fitted, made)), end="")


# Name -> what runs it, its arguments, its help.
PARTS = {
    "methods": (methods, methods_arguments, "settings side by side, on the same positions of the same text"),
    "table": (table, table_arguments, "the table of a report, as Markdown"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, (_, arguments, text) in PARTS.items():
        arguments(parts.add_parser(name, help=text, description=text))


def run(args: argparse.Namespace) -> int | None:
    return PARTS[args.part][0](args)

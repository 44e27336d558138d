"""The command line of `specattn eval`. Loads transformers and vLLM where they are used."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from specattn_vllm.evaluation import tasks_command
from specattn_vllm.evaluation.shared import (
    MEASURING,
    add_compared,
    add_engines,
    add_running,
    check_least,
    engines_of,
    list_settings,
    measure,
    positions_of,
    settings_of,
    tokenizer_of,
)
from specattn_vllm.installed import UserError, require
from specattn_vllm.outputs import output_file

LED = ("draft_model", "eagle", "eagle3", "mtp")
"""vLLM's drafters whose every draft is sampled where `forcing.py` can take the text's token instead."""


def methods_arguments(parser: argparse.ArgumentParser) -> None:
    add_compared(parser)
    text = parser.add_argument_group("the text")
    source = text.add_mutually_exclusive_group()
    source.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="documents; short ones are strung together"
    )
    source.add_argument(
        "--held-out",
        action="store_true",
        help="Python's standard library, which the demo pair was not trained on (the default)",
    )
    text.add_argument("--documents", type=int, default=8, metavar="N", help="how many [%(default)s]")
    text.add_argument(
        "--context", type=int, default=4096, metavar="N", help="tokens before the first scored one [%(default)s]"
    )
    text.add_argument("--positions", type=int, default=512, metavar="N", help="scored in each document [%(default)s]")
    how = add_engines(parser, "documents")
    how.add_argument(
        "--free-tokens", type=int, default=128, metavar="N",
        help="generated freely after each prompt, for the acceptance length [%(default)s]",
    )  # fmt: skip
    how.add_argument(
        "--record-kept", action="store_true",
        help="record what is kept of the first document, for the heat maps of `specattn report`",
    )  # fmt: skip
    add_running(parser, "specattn-eval.json", "the settings").add_argument(
        "--keep-reference", action="store_true",
        help="keep the dense run's distributions, in a folder beside --out, for settings that are added later",
    )  # fmt: skip


def methods(args: argparse.Namespace) -> int:
    check_least(args, documents=1, context=1, positions=1, draft_tokens=1, free_tokens=2, batch=1)
    given, settings = settings_of(args, args.context)
    if args.list:
        list_settings(settings)
        return 0

    require(MEASURING)
    from specattn_vllm.evaluation.methods_schema import Report
    from specattn_vllm.evaluation.report import markdown

    setup, jobs = plan(args, settings)
    return measure(args, Report, setup, jobs, given, markdown, keep_reference=args.keep_reference)


def plan(args: argparse.Namespace, settings: list) -> tuple[dict[str, Any], list]:
    """What all settings share, as the report tells it, and a job for each."""
    from specattn_vllm.evaluation import texts
    from specattn_vllm.evaluation.methods_schema import Job, text_tokens

    folders, common = engines_of(args, settings)
    refuse_what_cannot_be_led(common["engine_options"], args.draft_tokens)
    length = text_tokens(args.context, args.positions, args.draft_tokens)
    source = texts.files(args.text) if args.text else texts.held_out()
    check_room(args, folders["target"], common)
    tokenizer = tokenizer_of(folders["target"])
    documents = texts.documents(source, lambda text: tokenizer(text, verbose=False).input_ids, length, args.documents)
    common |= {"context": args.context, "positions": args.positions, "free_tokens": args.free_tokens}
    apart = {"batch": args.batch, "record_kept": args.record_kept}
    jobs = [
        Job(setting=setting, documents=[d.ids for d in documents], **folders, **common, **apart)
        for setting in settings
    ]
    named = [{"name": document.name, "sha256": document.digest} for document in documents]
    return common | {"documents": named}, jobs


def check_room(args: argparse.Namespace, target: str, common: dict[str, Any]) -> None:
    """Documents fit in the target's positions, as far as its configuration tells them: vLLM says it after minutes, and
    in other words."""
    from specattn_vllm.evaluation.methods_schema import positions_needed

    there = positions_of(target)
    if there is None or "max_model_len" in common["engine_options"]:
        return
    asked = {"positions": args.positions, "draft_tokens": args.draft_tokens, "free_tokens": args.free_tokens}
    needed = positions_needed(args.context, **asked)
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
            "drafter there are no rounds; leave it out (--draft drafts), or run `specattn eval tasks`, which leads none"
        )
    # Without a method vLLM tells it from the model.
    method = given.get("method") or "draft_model"
    if method not in LED and not method.endswith("mtp"):
        raise UserError(
            f"--engine-argument speculative_config with method {method!r}: its drafts are not sampled token by token "
            f"from a model, so they cannot be the text's; take one of {', '.join(map(repr, LED))}, leave it out "
            "(--draft drafts), or run `specattn eval tasks`, which leads none"
        )
    if given.get("num_speculative_tokens", draft_tokens) != draft_tokens:
        raise UserError(
            f"--engine-argument speculative_config with num_speculative_tokens {given['num_speculative_tokens']}, and "
            f"--draft-tokens {draft_tokens}: rounds have one length, give the same"
        )


def table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.json")
    methods = parser.add_argument_group("of `specattn eval methods` alone")
    methods.add_argument("--plot", type=output_file, metavar="FILE.png", help="also draw it")
    methods.add_argument("--against", metavar="NAME", help="also the differences from this setting, paired by document")


def table(args: argparse.Namespace) -> None:
    require(("numpy", *(("matplotlib",) if args.plot else ())))
    from specattn_vllm.evaluation import report as of_methods
    from specattn_vllm.evaluation import tasks_report as of_tasks
    from specattn_vllm.evaluation.methods_schema import Report
    from specattn_vllm.evaluation.schema import read
    from specattn_vllm.evaluation.tasks_schema import TaskReport

    kinds = (Report,) if args.against or args.plot else (Report, TaskReport)
    report = read(args.file, *kinds)
    print((of_methods if isinstance(report, Report) else of_tasks).markdown(report), end="")
    if args.against:
        print("\n" + of_methods.differences(report, args.against), end="")
    if args.plot:
        from specattn_vllm.evaluation import plot

        plot.save(report, args.plot)


# Name -> what runs it, its arguments, its help.
PARTS = {
    "methods": (
        methods,
        methods_arguments,
        "settings of the plugin side by side, on the same positions of the same text",
    ),
    "tasks": (
        tasks_command.tasks,
        tasks_command.add_arguments,
        "settings of the plugin side by side, by how many prompts with known answers they answer as expected",
    ),
    "table": (table, table_arguments, "the table of a report of one of them, as Markdown"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, (_, arguments, text) in PARTS.items():
        arguments(parts.add_parser(name, help=text, description=text))


def run(args: argparse.Namespace) -> int | None:
    return PARTS[args.part][0](args)

"""The command line of `specattn eval tasks`. Loads transformers and vLLM where they are used."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from specattn_vllm.bench.arguments import checked
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


def _numbers(kind: type) -> Any:
    def parse(text: str) -> list:
        try:
            found = [kind(part) for part in text.split(",")]
        except ValueError:
            example = "2048,4096" if kind is int else "0.1,0.9"
            raise ValueError(f"{text!r} is no list of numbers, e.g. {example}") from None
        if kind is float and not all(0 <= depth <= 1 for depth in found):
            raise ValueError(f"{text!r}: 0 is the beginning of a prompt, 1 its end")
        return found

    return checked(parse)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_compared(parser)
    what = parser.add_argument_group("the prompts")
    what.add_argument(
        "--file", type=Path, metavar="TASKS.jsonl",
        help='lines of {"prompt": ..., "answer": ..., "task": ...}, in the place of ours (docs/tasks.md)',
    )  # fmt: skip
    what.add_argument(
        "--task", action="append", default=[], metavar="NAME", help="this one of ours; may be repeated [all]"
    )
    what.add_argument(
        "--lengths", type=_numbers(int), default=[2048, 4096], metavar="N,N", help="tokens of a prompt [2048,4096]"
    )
    what.add_argument(
        "--depths", type=_numbers(float), default=[0.1, 0.5, 0.9], metavar="X,X",
        help="where the answer stands in it, from 0 to 1 [0.1,0.5,0.9]",
    )  # fmt: skip
    what.add_argument("--samples", type=int, default=4, metavar="N", help="for each of these [%(default)s]")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn [%(default)s]")
    what.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE",
        help="source code that prompts are cut out of [Python's standard library]",
    )  # fmt: skip
    add_engines(parser, "prompts")
    add_running(parser, "specattn-tasks.json", "tasks and settings").add_argument(
        "--write", type=output_file, metavar="TASKS.jsonl", help="write the prompts as lines for --file, and stop"
    )


def tasks(args: argparse.Namespace) -> int:
    from specattn_vllm.evaluation.tasks_generators import GENERATORS

    check_least(args, samples=1, draft_tokens=1, batch=1)
    for name in args.task:
        if name not in GENERATORS:
            raise UserError(f"--task {name!r}: there is no such task; there are {', '.join(map(repr, GENERATORS))}")
    if args.task and args.file:
        raise UserError(f"--task {args.task[0]!r} with --file: the file's prompts are in the place of ours; give one")
    given, settings = settings_of(args, max(args.lengths))
    if args.list:
        for name, make in GENERATORS.items():
            print(f"{name}\n  {' '.join(str(make.__doc__).split())}")
        print()
        list_settings(settings)
        return 0

    require(("transformers", "numpy") if args.write else MEASURING)
    from specattn_vllm.evaluation.tasks import write_file
    from specattn_vllm.evaluation.tasks_report import markdown
    from specattn_vllm.evaluation.tasks_schema import TaskReport

    setup, jobs = plan(args, settings)
    if args.write:
        write_file(jobs[0].samples, args.write, tokenizer_of(jobs[0].target))
        print(f"{len(jobs[0].samples)} prompts in {args.write}")
        return 0
    return measure(args, TaskReport, setup, jobs, given, markdown)


def plan(args: argparse.Namespace, settings: list) -> tuple[dict[str, Any], list]:
    """What all settings share, as the report tells it, and a job for each."""
    from specattn_vllm.evaluation import tasks as prompts
    from specattn_vllm.evaluation import texts
    from specattn_vllm.evaluation.tasks_generators import GENERATORS
    from specattn_vllm.evaluation.tasks_schema import TaskJob

    folders, common = engines_of(args, settings)
    tokenizer = tokenizer_of(folders["target"])
    if args.file:
        samples = list(prompts.read_file(args.file, tokenizer))
    else:
        source = texts.files(args.text) if args.text else texts.held_out()
        names = args.task or list(GENERATORS)
        samples = prompts.generate(names, args.lengths, args.depths, args.samples, source, tokenizer, args.seed)
    positions, name = positions_of(folders["target"]), common["models"]["target"]["name"]
    prompts.check_lengths(samples, positions, name, 2 * (args.draft_tokens + 1))
    jobs = [TaskJob(setting=setting, samples=samples, batch=args.batch, **folders, **common) for setting in settings]
    return common | {"samples": [prompts.told(sample) for sample in samples]}, jobs

"""The command line of `specattn eval`. Loads transformers and vLLM where they are used."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from specattn_vllm.bench.arguments import checked
from specattn_vllm.bench.command import require
from specattn_vllm.bench.grid import parse_option
from specattn_vllm.installed import UserError, demo_folder

DEMO = "demo"


def methods_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--target", default=DEMO, metavar="MODEL", help="a folder or a name that vLLM can load [%(default)s]"
    )
    what.add_argument("--draft", default=DEMO, metavar="MODEL", help="likewise [%(default)s]")
    what.add_argument(
        "--settings", type=Path, metavar="FILE.json", help='[{"name": ..., "options": {...}}, ...] in the place of ours'
    )
    what.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="this setting, beside dense; may be repeated"
    )
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
    how = parser.add_argument_group("the engines")
    how.add_argument("--draft-tokens", type=int, default=4, metavar="K", help="drafted a round [%(default)s]")
    how.add_argument(
        "--free-tokens", type=int, default=128, metavar="N",
        help="generated freely after each prompt, for the acceptance length [%(default)s]",
    )  # fmt: skip
    how.add_argument("--batch", type=int, default=8, metavar="N", help="documents at a time [%(default)s]")
    how.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    how.add_argument("--dtype", help="[float32 on a CPU, bfloat16 on a GPU]")
    how.add_argument(
        "--engine-argument", type=checked(parse_option), action="append", default=[], metavar="KEY=VALUE",
        help="an argument of vllm.LLM, e.g. enforce_eager=true; may be repeated",
    )  # fmt: skip
    how.add_argument(
        "--record-kept", action="store_true",
        help="record what is kept of the first document, for the heat maps of `specattn report`",
    )  # fmt: skip
    run = parser.add_argument_group("running")
    run.add_argument(
        "--out", type=Path, default=Path("specattn-eval.json"), metavar="FILE.json",
        help="written after each setting; what it holds already is not run again [%(default)s]",
    )  # fmt: skip
    run.add_argument("--overwrite", action="store_true", help="throw away what --out holds")
    run.add_argument(
        "--keep-reference", action="store_true",
        help="keep the dense run's distributions, in a folder beside --out, for settings that are added later",
    )  # fmt: skip
    run.add_argument("--list", action="store_true", help="show the settings and stop")
    run.add_argument("--commit", metavar="NAME", help="recorded, where the checkout does not know its own")


def methods(args: argparse.Namespace) -> int:
    from specattn_vllm.evaluation.report import markdown
    from specattn_vllm.evaluation.settings import chosen, default_settings, read_settings

    for name, least in (
        ("documents", 1), ("context", 1), ("positions", 1), ("draft_tokens", 1), ("free_tokens", 2), ("batch", 1)
    ):  # fmt: skip
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    given = read_settings(args.settings) if args.settings else default_settings(args.context)
    settings = chosen(given, args.only)
    if args.list:
        for setting in settings:
            told = setting.options if setting.peer is None else setting.model_dump(exclude={"name"}, exclude_none=True)
            print(f"{setting.name}\n  {json.dumps(told)}")
        return 0

    from specattn_vllm.bench.provenance import provenance
    from specattn_vllm.evaluation import runner
    from specattn_vllm.evaluation.schema import Report

    setup, jobs = plan(args, settings)
    results = [] if args.overwrite else runner.earlier(args.out, setup)
    report = Report(provenance=provenance(args.commit), setup=setup, results=results)
    order = [setting.name for setting in given]
    failed = runner.run_all(jobs, report, args.out, order, keep_reference=args.keep_reference)
    if any(result.is_reference for result in report.results):
        print("\n" + markdown(report.model_dump(mode="json")))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def plan(args: argparse.Namespace, settings: list) -> tuple[dict[str, Any], list]:
    """What all settings share, as the report tells it, and a job for each."""
    from specattn_vllm.bench.provenance import has_gpu
    from specattn_vllm.evaluation import texts
    from specattn_vllm.evaluation.schema import Job, text_tokens

    engine_options = dict(args.engine_argument)
    peers = [setting.name for setting in settings if setting.peer is not None]
    if peers and engine_options.get("enforce_eager") is False:
        raise UserError(
            f"--engine-argument enforce_eager=false: {peers[0]!r} is a peer, which waits for the device in each layer "
            "and runs in engines without graphs; leave the argument out, or the peers (--only)"
        )
    device = args.device if args.device != "auto" else ("cuda" if has_gpu() else "cpu")
    folders = {role: str(demo_folder(role)) if name == DEMO else name for role, name in _models(args).items()}
    length = text_tokens(args.context, args.positions, args.draft_tokens)
    source = texts.files(args.text) if args.text else texts.held_out()
    documents = texts.documents(source, _tokenizer(folders["target"]), length, args.documents)
    common = {
        "models": {role: _identity(args, role, folder) for role, folder in folders.items()},
        "context": args.context,
        "positions": args.positions,
        "draft_tokens": args.draft_tokens,
        "free_tokens": args.free_tokens,
        "device": device,
        "dtype": args.dtype or ("float32" if device == "cpu" else "bfloat16"),
        "engine_options": engine_options,
    }
    apart = {"batch": args.batch, "record_kept": args.record_kept}
    jobs = [
        Job(setting=setting, documents=[d.ids for d in documents], **folders, **common, **apart)
        for setting in settings
    ]
    named = [{"name": document.name, "sha256": document.digest} for document in documents]
    return common | {"documents": named}, jobs


def _models(args: argparse.Namespace) -> dict[str, str]:
    return {"target": args.target, "draft": args.draft}


def _identity(args: argparse.Namespace, role: str, folder: str) -> dict[str, Any]:
    """A model by name and, where its files are at hand, by its weights."""
    from specattn_vllm.fingerprint import weights_digest

    name = _models(args)[role]
    digest = weights_digest(Path(folder)) if Path(folder).is_dir() else None
    return {"name": f"the demo {role}" if name == DEMO else Path(name).name or name, "weights": digest}


def _tokenizer(model: str):
    """As vLLM makes token ids of a prompt: with the tokens that the model wants at its beginning."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: tokenizer(text, verbose=False).input_ids


def table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it")
    parser.add_argument("--against", metavar="NAME", help="also the differences from this setting, paired by document")


def table(args: argparse.Namespace) -> None:
    from specattn_vllm.evaluation.report import differences, markdown
    from specattn_vllm.evaluation.schema import Report

    try:
        results = json.loads(args.file.read_text())
        text = markdown(results)
    except (OSError, ValueError, StopIteration) as error:
        reason = str(error).splitlines()[0] if str(error) else "no dense run in it"
        raise UserError(f"{args.file} is no report of `specattn eval methods`: {reason}") from None
    print(text, end="")
    if args.against:
        print("\n" + differences(Report.model_validate(results), args.against), end="")
    if args.plot:
        require(("matplotlib",))
        from specattn_vllm.evaluation import plot

        plot.save(Report.model_validate(results), args.plot)


# Name -> what runs it, its arguments, its help.
PARTS = {
    "methods": (
        methods,
        methods_arguments,
        "settings of the plugin side by side, on the same positions of the same text",
    ),
    "table": (table, table_arguments, "the table of a report, as Markdown"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, (_, arguments, text) in PARTS.items():
        arguments(parts.add_parser(name, help=text, description=text))


def run(args: argparse.Namespace) -> int | None:
    return PARTS[args.part][0](args)

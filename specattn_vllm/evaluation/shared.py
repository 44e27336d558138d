"""What the commands that measure settings have in common: the pair of models, the engines, and how they are run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn_vllm.bench.arguments import add_gpus, checked
from specattn_vllm.bench.grid import parse_option
from specattn_vllm.causes import told
from specattn_vllm.installed import UserError, demo_folder
from specattn_vllm.interrupts import ended_as_interrupted, resumed, status_of
from specattn_vllm.outputs import output_file

if TYPE_CHECKING:
    from specattn_vllm.evaluation.schema import AnyReport, EngineJob, Setting

DEMO = "demo"
MEASURING = ("torch", "transformers", "vllm", "numpy")
"""Modules that measuring takes; tables and pages of what was measured take less."""
UNSTRETCHED = ("llama3", "yarn", "longrope")
"""Kinds of RoPE whose models' positions have their factor in them already."""


def add_compared(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--target", default=DEMO, metavar="MODEL", help="a folder or a name that vLLM can load [%(default)s]"
    )
    what.add_argument("--draft", default=DEMO, metavar="MODEL", help="likewise [%(default)s]")
    what.add_argument(
        "--settings", type=Path, metavar="FILE.json", help='[{"name": ..., "options": {...}}, ...] in the place of ours'
    )
    what.add_argument(
        "--layer-map", type=Path, metavar="FILE.json",
        help="the pair's, for all settings whose selections come from a draft model and that name none themselves",
    )  # fmt: skip
    what.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="this setting, beside dense; may be repeated"
    )


def add_engines(parser: argparse.ArgumentParser, batch_of: str) -> argparse._ArgumentGroup:
    how = parser.add_argument_group("the engines")
    how.add_argument("--draft-tokens", type=int, default=4, metavar="K", help="drafted a round [%(default)s]")
    how.add_argument("--batch", type=int, default=8, metavar="N", help=f"{batch_of} at a time [%(default)s]")
    how.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    how.add_argument("--dtype", help="[float32 on a CPU, bfloat16 on a GPU]")
    how.add_argument(
        "--engine-argument", type=checked(parse_option), action="append", default=[], metavar="KEY=VALUE",
        help="an argument of vllm.LLM, e.g. enforce_eager=true; may be repeated",
    )  # fmt: skip
    return how


def add_running(parser: argparse.ArgumentParser, out: str, listed: str) -> argparse._ArgumentGroup:
    run = parser.add_argument_group("running")
    run.add_argument(
        "--out", type=output_file, default=Path(out), metavar="FILE.json",
        help="written after each setting; what it holds already is not run again [%(default)s]",
    )  # fmt: skip
    run.add_argument("--overwrite", action="store_true", help="throw away what --out holds")
    run.add_argument("--list", action="store_true", help=f"show {listed} and stop")
    add_gpus(run, "settings")
    run.add_argument("--commit", metavar="NAME", help="recorded, where the checkout does not know its own")
    return run


def check_least(args: argparse.Namespace, **least: int) -> None:
    for name, number in least.items():
        if getattr(args, name) < number:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {number}")


def settings_of(args: argparse.Namespace, context: int) -> tuple[list[Setting], list[Setting]]:
    """All settings of the file or of the default list, for prompts of `context` tokens, and those to be run."""
    from specattn_vllm.evaluation.settings import chosen, default_settings, read_settings, with_layer_map

    given = read_settings(args.settings) if args.settings else default_settings(context)
    if args.layer_map is not None:
        given = with_layer_map(given, args.layer_map)
    return given, chosen(given, args.only)


def measure(
    args: argparse.Namespace, kind: type[AnyReport], setup: dict[str, Any], jobs: list[EngineJob],
    given: list[Setting], markdown: Callable[[Any], str], **running: Any,
) -> int:  # fmt: skip
    """Run what the report in --out lacks, show the table, and return the exit status. `given` are the settings in the
    order that they stand in; `running` goes to `runner.run_all`."""
    from specattn_vllm.bench.provenance import provenance
    from specattn_vllm.evaluation import runner

    results = [] if args.overwrite else runner.earlier(args.out, setup, kind)
    report = kind(provenance=provenance(args.commit), setup=setup, results=results)
    running["gpus"] = args.gpus
    try:
        with ended_as_interrupted():
            failed = runner.run_all(jobs, report, args.out, [setting.name for setting in given], **running)
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted; this goes on after the settings in {args.out}: {resumed()}")
        return status_of(interrupt)
    if report.dense is not None:
        print("\n" + markdown(report))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def list_settings(settings: list[Setting]) -> None:
    for setting in settings:
        more = setting.model_dump(exclude={"name"}, exclude_defaults=True)
        told = setting.options if more.keys() == {"options"} else more
        print(f"{setting.name}\n  {json.dumps(told)}")


def engines_of(args: argparse.Namespace, settings: list[Setting]) -> tuple[dict[str, str], dict[str, Any]]:
    """Where the two models are, and what all engines share, as the report tells it."""
    from specattn_vllm.bench.provenance import has_gpu

    engine_options = dict(args.engine_argument)
    peers = [setting.name for setting in settings if setting.peer is not None]
    if peers and engine_options.get("enforce_eager") is False:
        raise UserError(
            f"--engine-argument enforce_eager=false: {peers[0]!r} is a peer, which waits for the device in each layer "
            "and runs in engines without graphs; leave the argument out, or the peers (--only)"
        )
    device = args.device if args.device != "auto" else ("cuda" if has_gpu() else "cpu")
    folders = {role: model_folder(role, name) for role, name in _models(args).items()}
    return folders, {
        "models": {role: _identity(args, role, folder) for role, folder in folders.items()},
        "draft_tokens": args.draft_tokens,
        "device": device,
        "dtype": args.dtype or ("float32" if device == "cpu" else "bfloat16"),
        "engine_options": engine_options,
    }


def _models(args: argparse.Namespace) -> dict[str, str]:
    return {"target": args.target, "draft": args.draft}


def model_folder(role: str, name: str) -> str:
    """Where a model is: the demo pair's folder, a folder, or a name on the hub, which is looked up later."""
    if name == DEMO:
        return str(demo_folder(role))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"--{role} {name}: no config.json in this folder, so it holds no model")
        return str(folder)
    # Names on the hub are OWNER/MODEL or MODEL.
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"--{role} {name}: there is no such folder; give one that holds a model, or a name on the hub")
    return name


def _identity(args: argparse.Namespace, role: str, folder: str) -> dict[str, Any]:
    """A model by name and, where its files are at hand, by its weights."""
    from specattn_vllm.fingerprint import weights_digest

    name = _models(args)[role]
    digest = weights_digest(Path(folder)) if Path(folder).is_dir() else None
    return {"name": f"the demo {role}" if name == DEMO else Path(name).name or name, "weights": digest}


def tokenizer_of(model: str) -> Any:
    """Called with a text, it makes token ids as vLLM does: with those that the model wants at the beginning."""
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, model, "tokenizer")


def positions_of(model: str) -> int | None:
    """How many positions a model has, where its configuration says so and nothing stretches them."""
    from transformers import AutoConfig

    config = _loaded(AutoConfig, model, "configuration")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("factor") and rope.get("rope_type", rope.get("type")) not in UNSTRETCHED:
        return None  # vLLM knows by how much
    return getattr(config, "max_position_embeddings", None)


def _loaded(kind: Any, model: str, what: str) -> Any:
    """transformers' reading of the target, whose reasons for failing are tracebacks of several libraries."""
    try:
        return kind.from_pretrained(model)
    except Exception as error:
        where = "this folder" if Path(model).is_dir() else "a name on the Hugging Face hub, nor a folder here"
        remedy = "see that its files are whole" if Path(model).is_dir() else "give a folder that holds a model"
        raise UserError(f"--target {model}: no {what} in {where} ({told(error)}): {remedy}") from None

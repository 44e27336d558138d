"""The `specattn` command. It imports neither torch nor vLLM, so it answers at once, even in a broken installation."""

import argparse
import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import specattn_vllm
from specattn_vllm import cpu_runner
from specattn_vllm.installed import DEMO_ROLES, UserError, demo_folder
from specattn_vllm.tools.interrupts import status_of


def cpu_env(args: argparse.Namespace) -> None:
    variables = cpu_runner.environment()
    if args.json:
        print(json.dumps(variables, indent=2))
    else:
        for name, value in variables.items():
            print(f"export {name}={shlex.quote(value)}")


def demo_path(args: argparse.Namespace) -> None:
    print(demo_folder(args.role))


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object, for scripts")


def _demo_path_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("role", choices=DEMO_ROLES)


def _with_default_part(argv: Sequence[str]) -> list[str]:
    """`specattn bench --shape S` means `specattn bench engines --shape S`."""
    argv = list(argv)
    if argv[:1] == ["bench"] and not (len(argv) > 1 and (argv[1] in ("-h", "--help") or not argv[1].startswith("-"))):
        argv.insert(1, "engines")
    return argv


def _with_marked_rest(argv: list[str]) -> list[str]:
    """`specattn doctor --port 1 MODEL` reaches the doctor, which says what is wrong with it: argparse would name the
    first word alone. And help is the doctor's own, wherever it is asked for."""
    if argv[:1] != ["doctor"]:
        return argv
    if {"-h", "--help"} & set(argv):
        return ["doctor", "--help"]
    own = ("--json", "--no-generation")
    for place, word in enumerate(argv[1:], 1):
        if not word.startswith("-") or word == "--":
            break
        if not any(flag.startswith(word) for flag in own):
            return [*argv[:place], "--", *argv[place:]]
    return argv


def methods(args: argparse.Namespace) -> None:
    from specattn_vllm.methods import METHODS, load_others

    for line in load_others():
        print(f"specattn: warning: {line}", file=sys.stderr)
    if args.json:
        told = {
            name: {
                "summary": method.summary,
                "lossless": method.lossless,
                "options": method.options(method=name).model_dump(mode="json", exclude={"method"}),
            }
            for name, method in METHODS.items()
        }
        print(json.dumps(told, indent=2))
        return
    width = max(map(len, METHODS))
    for name, method in METHODS.items():
        print(f"{name:{width}}  {method.summary}")


class Command(NamedTuple):
    run: Callable[[argparse.Namespace], int | None]
    """Returns the exit code; None is 0."""
    help: str
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def in_module(name: str, help: str) -> Command:
    """A subcommand whose `add_arguments` and `run` are in a module, which is imported once they are called."""

    def call(function: str, given: Any) -> Any:
        return getattr(import_module(f"specattn_vllm.{name}"), function)(given)

    return Command(partial(call, "run"), help, partial(call, "add_arguments"))


# One line per subcommand. A `run` that needs torch or vLLM imports it inside.
COMMANDS = {
    "info": in_module("info", "what is installed, and whether it fits together"),
    "doctor": in_module("doctor.command", "tries what a server needs, and says what to do about what fails"),
    "methods": Command(methods, "the available methods, and how each of them chooses tokens", _json_argument),
    "cpu-env": Command(cpu_env, "the variables that let vLLM use this plugin without a GPU", _json_argument),
    "demo-path": Command(demo_path, "the folder of one of the two demo models", _demo_path_arguments),
    "bench": in_module("bench.command", "how fast it decodes, next to stock vLLM, on this machine"),
    "calibrate": in_module("calibrate.command", "the layer map of a pair of models, measured on text"),
    "eval": in_module("evaluation.command", "what pruning costs in quality, measured in engines"),
    "report": in_module("evaluation.html.command", "what `eval` and `bench` measured, as one HTML page"),
    "completion": in_module("completion", "the script by which a shell completes this command's words"),
}


def build_parser(*chosen: str) -> argparse.ArgumentParser:
    """Arguments of the chosen subcommands only: those of another need modules that a broken installation may lack."""
    parser = argparse.ArgumentParser(prog="specattn", description="specattn-vllm's own command, next to `vllm`.")
    parser.add_argument("--version", action="version", version=f"specattn-vllm {specattn_vllm.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = subparsers.add_parser(name, help=command.help, description=command.help)
        if name in chosen:
            command.arguments(added)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = _with_marked_rest(_with_default_part(sys.argv[1:] if argv is None else argv))
    args = build_parser(*[word for word in words if word in COMMANDS][:1]).parse_args(words)
    try:
        status = COMMANDS[args.command].run(args) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"specattn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:  # commands that can be resumed handle it themselves
        print("\nspecattn: interrupted", file=sys.stderr)
        return status_of(interrupt)
    except BrokenPipeError:
        # The reader of the output has closed it, for example `head`. Python must not report an error at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:  # a file of its own has a name
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"specattn: error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""`specattn completion SHELL`: a script by which a shell completes subcommands, their options, files and folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from specattn_vllm.installed import UserError, require
from specattn_vllm.tools.outputs import output_file

WHERE = {
    "bash": "specattn completion bash > ~/.local/share/bash-completion/completions/specattn",
    "zsh": "specattn completion zsh > FOLDER/_specattn, where FOLDER is one of $fpath",
    "tcsh": "specattn completion tcsh > ~/.specattn.csh, and in ~/.tcshrc: source ~/.specattn.csh",
}
"""How each shell is told."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=[*WHERE], help="for which shell")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["where it goes; new terminals have it:", *(f"  {line}" for line in WHERE.values())])


def run(args: argparse.Namespace) -> None:
    require(("shtab",))
    print(script(args.shell))


def script(shell: str) -> str:
    import shtab

    from specattn_vllm import cli

    try:
        parser = cli.build_parser(*cli.COMMANDS)
        # `specattn bench --grid ...` means the part `engines`, so its options are completed there too.
        from specattn_vllm.bench.command import engines_arguments

        (subcommands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        engines_arguments(subcommands.choices["bench"])
    except ImportError as error:
        raise UserError(
            f"completion lists the options of all subcommands, and one of them cannot be loaded ({error}): "
            "`specattn doctor` says what is missing"
        ) from None
    _name_files(parser, shtab.FILE, shtab.DIRECTORY)
    return shtab.complete(parser, shell=shell)


def _name_files(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Arguments that are files are completed by files, and models by folders: they may be names on the hub too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _name_files(below, file, folder)
        elif action.type in (Path, output_file):
            action.complete = file  # type: ignore[attr-defined]
        elif action.metavar in ("MODEL", "MODEL ..."):
            action.complete = folder  # type: ignore[attr-defined]

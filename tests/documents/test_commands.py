"""Commands in the documents are taken by the programs that they name, and their options by the plugin."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from specattn_vllm import cli, compat
from specattn_vllm.options import SpecAttnOptions

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docker/README.md"]
# What docs/add-a-method.md says is run as a whole (tests/engine/test_add_a_method.py): its method is not ours.
DOCUMENTS += [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "add-a-method.md"]
OTHERS = {"pip", "docker", "curl", "eval", "cp", "git"}
"""Programs that are not ours."""


def commands() -> list[tuple[str, str]]:
    """(page, command) of blocks in fences and of indented ones. Words in capitals stand for what a reader has."""
    found = []
    for page in DOCUMENTS:
        text = page.read_text()
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
        blocks += [
            "\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?:^    .*\n)+", text, re.M)
        ]
        for block in blocks:
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                line = re.sub(r"\s# .*", "", line).strip()
                if re.match(r"(specattn|vllm|python|scripts/\S+|[A-Z_]+=\S*|" + "|".join(OTHERS) + r")( |$)", line):
                    found.append((page.name, line))
    return found


COMMANDS = commands()


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command[:50]}" for page, command in COMMANDS])
def test_it_is_taken(page, command):
    if "..." in command or "N " in f"{command} ":
        pytest.skip("it leaves something out")
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, *rest = words
    if program == "specattn":
        argv = cli._with_default_part(rest)
        assert cli.build_parser(argv[0]).parse_args(argv)
    elif program == "vllm" and rest[0] == "serve":
        model, *arguments = rest[1:]
        compat.apply_all()
        found = compat.serve_parser().parse_args(["--model", model, *arguments])
        assert SpecAttnOptions.from_additional(json.loads(json.dumps(found.additional_config)))
    elif program.startswith("scripts/"):
        assert (ROOT / program).is_file()
    elif program == "python":
        assert (ROOT / next(word for word in rest if not word.startswith("-"))).is_file()
    else:
        assert program in OTHERS, program


def test_there_are_many_of_each():
    programs = [command.split()[0] for _, command in COMMANDS]
    assert programs.count("specattn") > 20 and programs.count("vllm") > 6 and len(COMMANDS) > 50


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_options_in_the_text_are_taken(page):
    for given in re.findall(r"--additional-config '(\{.*?\})'", page.read_text()):
        assert SpecAttnOptions.from_additional(json.loads(given))
    for block in re.findall(r"^```json\n(.*?)^```", page.read_text(), re.M | re.S):
        json.loads(block)

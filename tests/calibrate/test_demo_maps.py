"""The shipped maps of the demo pair: from which text, and by which commands."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from specattn_vllm import cli, layer_map  # noqa: E402
from specattn_vllm.calibrate import runner, text  # noqa: E402
from specattn_vllm.evaluation.texts import held_out  # noqa: E402

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "layer-maps.md"
COMMANDS = {"demo": "--criterion papers ", "demo-sts": "--method sts --criterion papers "}


def test_the_demo_pairs_text_is_none_that_is_evaluated_on():
    def lines(content: str) -> set[str]:
        return {line.strip() for line in content.splitlines() if len(line.strip()) >= 30}

    ours = lines(text.DEMO_TEXT.read_text())
    assert len(ours) > 300
    for name, content in held_out():
        assert len(ours & lines(content)) <= 2, name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_are_those_of_the_documentation_and_of_the_maps_themselves(name):
    assert f"\nspecattn calibrate {COMMANDS[name]}--out {name}.json\n" in DOCUMENT.read_text()
    given = cli.build_parser("calibrate").parse_args(["calibrate", *COMMANDS[name].split(), "--out", f"{name}.json"])
    told = json.loads(layer_map.shipped()[name].read_text())["provenance"]["settings"]
    assert {field: getattr(given, field) for field in runner.SETTINGS} | {"dtype": "float32"} == told


@pytest.mark.parametrize("name", COMMANDS)
def test_the_demo_pairs_maps_come_from_the_command(tmp_path, name):
    """Figures may differ in their last digit where another processor or release adds up in another order."""
    out = tmp_path / f"{name}.json"
    assert cli.main(["calibrate", "--out", str(out), "--device", "cpu", *COMMANDS[name].split()]) == 0
    shipped, found = (json.loads(path.read_text()) for path in (layer_map.shipped()[name], out))
    ours, theirs = found.pop("provenance"), shipped.pop("provenance")
    assert found == shipped
    measured = {"similarity", "head_similarity"} & theirs.keys()
    for field in measured:
        assert torch.allclose(*(torch.tensor(of[field]) for of in (ours, theirs)), atol=2e-4), field
    same = theirs.keys() - measured - {"versions"}
    assert {field: ours[field] for field in same} == {field: theirs[field] for field in same}
    assert len(measured) == (2 if name == "demo-sts" else 1) and ours.keys() == theirs.keys()

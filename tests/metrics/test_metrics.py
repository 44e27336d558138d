"""What a worker publishes, and what a server makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from specattn_vllm.evaluation import scan
from specattn_vllm.kernels.sketch.layout import SketchLayout
from specattn_vllm.methods import METHODS
from specattn_vllm.metrics import collect, publish, snapshot
from specattn_vllm.metrics.families import FAMILIES, INFO
from specattn_vllm.metrics.snapshot import Audited, Cache, Snapshot
from specattn_vllm.selection.audit_report import BINS, lower_edge
from specattn_vllm.stats import Counts


@pytest.fixture
def served(tmp_path):
    """served(*snapshots) -> {(name, labels without engine): value} of what is scraped."""

    def scrape(*found: Snapshot) -> dict:
        for one in found:
            one.write(tmp_path)
        registry = CollectorRegistry()
        registry.register(collect.SnapshotCollector(tmp_path))
        text = generate_latest(registry).decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        seen = {(s.name, *sorted((k, v) for k, v in s.labels.items() if k != "engine")): s.value for s in samples}
        assert len(seen) == len(samples), "a series that is there twice, which Prometheus refuses"
        return seen

    return scrape


def test_a_snapshot_is_written_whole_and_read_as_it_was(tmp_path, made):
    found = made(audited=Audited([(0.75, 3), (1.0, 9)], 7.5))
    found.write(tmp_path)
    found.write(tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]
    assert snapshot.read_all(tmp_path) == [found]


def test_files_of_others_and_of_workers_that_are_gone_are_passed_over(tmp_path, made):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    made(pid=gone.pid).write(tmp_path)
    (tmp_path / "half.json").write_text('{"engine": 0')
    (tmp_path / "other.json").write_text('{"engine": 0}')
    (tmp_path / "list.json").write_text("[]")
    assert snapshot.read_all(tmp_path) == []
    assert snapshot.read_all(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "changed",
    [
        {"pid": "1"},
        {"pid": 10**30},
        {"engine": "a"},
        {"rank": None},
        {"info": {}},
        {"caches": 3},
        {"caches": {"drafting": {}}},
        {"counts": {"rounds": "many"}},
        {"audited": {"buckets": [[1, 2, 3]], "total": 1}},
    ],
    ids=str,
)
def test_a_damaged_file_takes_no_metrics_away(changed, tmp_path, made):
    good = made()
    good.write(tmp_path)
    [path] = tmp_path.glob("*.json")
    (tmp_path / "damaged.json").write_text(json.dumps(json.loads(path.read_text()) | changed))
    for number, content in enumerate((b"5", b"null", b'"text"', b"[" * 100_000, b"\xff", b"9" * 10_000)):
        (tmp_path / f"{number}.json").write_bytes(content)
    assert snapshot.read_all(tmp_path) == [good]


def test_a_folder_is_made_once_and_goes_with_the_process_that_made_it(tmp_path):
    program = (
        "import os\n"
        "from specattn_vllm.metrics import snapshot\n"
        "assert snapshot.folder() is None\n"
        "snapshot.make_folder(); first = snapshot.folder(); snapshot.make_folder()\n"
        "assert first == snapshot.folder() and first.is_dir()\n"
        "assert os.environ[snapshot.FOR_RAY] == 'MINE,' + snapshot.FOLDER\n"
        "if (child := os.fork()) == 0: raise SystemExit\n"
        "os.waitpid(child, 0)\n"
        "assert first.is_dir(), 'a child took it away'\n"
        "print(first)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != snapshot.FOLDER}
    environment |= {"TMPDIR": str(tmp_path), snapshot.FOR_RAY: "MINE"}
    run = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path)) and not list(tmp_path.iterdir())


def test_each_count_has_its_series(served, made):
    seen = served(made())
    c = made().counts
    assert seen["specattn:rounds_total",] == c.rounds
    assert seen["specattn:sampled_tokens_total",] == c.sampled_tokens
    kinds = {"sparse": c.sparse_rows, "dense": c.verify_rows - c.sparse_rows, "prefill": c.prefill_rows}
    assert {kind: seen["specattn:rows_total", ("kind", kind)] for kind in kinds} == kinds
    verification, drafting = (("by", by) for by in made().caches)
    rank = ("rank", "0")
    assert seen["specattn:kv_entries_read_total", verification, rank] == c.kv_read
    assert seen["specattn:kv_entries_read_total", drafting, rank] == c.draft_kv_read
    assert seen["specattn:kv_entries_present_total", verification, rank] == c.kv_full
    assert seen["specattn:kv_entries_present_total", drafting, rank] == c.draft_kv_full
    assert seen["specattn:kv_entries_searched_total", verification, rank] == c.kv_scanned
    assert ("specattn:kv_entries_searched_total", drafting, rank) not in seen, "nothing is searched there"
    searched = 34 * (c.kv_scanned + c.kv_sampled)
    assert seen["specattn:kv_bytes_read_total", verification, rank] == 512 * c.kv_read + searched
    assert seen["specattn:kv_bytes_read_total", drafting, rank] == 256 * c.draft_kv_read
    assert seen["specattn:kv_bytes_present_total", verification, rank] == 512 * c.kv_full
    assert seen["specattn:selection_seconds_total", verification, rank] == c.selection_ns / 1e9
    assert seen["specattn:selection_seconds_total", drafting, rank] == c.draft_selection_ns / 1e9
    held = c.heads_checked - c.heads_fallen
    assert seen["specattn:guarantee_selections_total", rank, ("result", "held")] == held
    assert seen["specattn:guarantee_selections_total", rank, ("result", "read everything")] == c.heads_fallen
    assert seen["specattn:info", *sorted((label, f"a {label}") for label in INFO)] == 1


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bytes_are_those_of_evaluations(served, bits, made):
    """In 16 bits; docs/evaluation.md has the formula."""
    layout = SketchLayout(heads=2, block_size=16, head_size=64, bits=bits, element_size=2)
    seen = served(made(caches={"verification": Cache(layout.kv_bytes, layout.token_bytes)}))
    read, there = (
        seen[f"specattn:kv_bytes_{what}_total", ("by", "verification"), ("rank", "0")] for what in ("read", "present")
    )
    assert read / there == pytest.approx(scan.byte_fraction(made().counts, scan.of_sketch(bits, 64)))


def reasons(seen: dict) -> dict[str, float]:
    return {key[1][1]: value for key, value in seen.items() if key[0] == "specattn:dense_rows_total"}


def test_reasons_of_dense_rows_add_up_to_them(served, made):
    own = Counts(verify_rows=20, sparse_rows=11, exact_rows=2, small_batch_rows=3)
    seen = served(made(counts=own))
    assert reasons(seen) == {"exact": 2, "small batch": 3, "short context": 4}
    by_draft = Counts(
        verify_rows=20, sparse_rows=4, no_selection_rows=15, exact_rows=2, small_batch_rows=3, stale_rows=1
    )
    seen = served(made(dense_reasons=METHODS["specattn"].dense_reasons, counts=by_draft))
    assert reasons(seen) == {"exact": 2, "small batch": 3, "no selection": 10, "stale": 1}
    assert sum(reasons(seen).values()) == seen["specattn:rows_total", ("kind", "dense")]


def test_without_a_guarantee_it_has_no_series(served, made):
    seen = served(made(counts=Counts(verify_rows=20, sparse_rows=11)))
    assert "specattn:guarantee_selections_total" not in {key[0] for key in seen}


def test_what_is_not_counted_has_no_series(served, made):
    seen = served(made(dense_reasons=(), drafts=False, caches={}))
    assert {key[0] for key in seen} == {"specattn:info"}


def test_ranks_share_rounds_and_rows_and_have_entries_of_their_own(served, made):
    halves = [Counts(rounds=7, kv_read=10 * (rank + 1), kv_full=100) for rank in range(2)]
    seen = served(*(made(rank=rank, counts=counts) for rank, counts in enumerate(halves)))
    assert seen["specattn:rounds_total",] == 7
    by = ("by", "verification")
    assert [seen["specattn:kv_entries_read_total", by, ("rank", r)] for r in "01"] == [10, 20]
    assert sum(key[0] == "specattn:rows_total" for key in seen) == 3


def test_data_parallel_engines_are_told_apart(tmp_path, made):
    for engine in range(2):
        made(engine=engine, counts=Counts(rounds=engine + 1)).write(tmp_path)
    [family] = [m for m in collect.SnapshotCollector(tmp_path).collect() if m.name == "specattn:rounds"]
    assert {sample.labels["engine"]: sample.value for sample in family.samples} == {"0": 1, "1": 2}


def test_retained_mass_is_a_histogram(served, made):
    histogram = torch.zeros((2, BINS), dtype=torch.int64)
    histogram[0, [10, 50]] = torch.tensor([1, 2])
    histogram[1, 63] = 5
    retained = torch.tensor([2.0, 4.5], dtype=torch.float64)
    audited = publish.audited([histogram, histogram.sum(1), retained, 0 * retained, 0 * retained])
    assert audited.buckets[-1] == (1.0, 8)
    seen = served(made(audited=audited))
    name, rank = "specattn:audit_retained_mass", ("rank", "0")
    assert (seen[name + "_count", rank], seen[name + "_sum", rank]) == (8, 6.5)
    below = {float(dict(key[1:])["le"]): n for key, n in seen.items() if key[0] == name + "_bucket"}
    assert below[round(lower_edge(48), 4)] == 1
    assert below[round(lower_edge(52), 4)] == 3
    assert list(below.values()) == sorted(below.values())


def test_names_and_texts_are_those_of_prometheus():
    for family in FAMILIES:
        assert family.name.startswith("specattn:")
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert family.text.endswith(".") and len(family.text) < 150

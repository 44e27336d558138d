"""`specattn bench kernels`, without a GPU: its arithmetic, its inputs, its rows, and a run over the references."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest
import torch

from specattn_vllm import cli
from specattn_vllm.bench import kernel_data as data
from specattn_vllm.bench import kernel_report as report
from specattn_vllm.bench import kernel_shapes as shapes
from specattn_vllm.bench import kernel_sketch, kernels
from specattn_vllm.bench import kernel_sweep as sweep
from specattn_vllm.bench import kernel_timing as timing
from specattn_vllm.bench.kernel_bench import Bench, Skip, relative_error
from specattn_vllm.bench.kernel_shapes import Batch, Heads
from specattn_vllm.kernels import reference
from specattn_vllm.kernels.sketch import contracts
from specattn_vllm.kernels.sketch import reference as sketch_reference
from specattn_vllm.kernels.sketch.layout import sketch_views
from specattn_vllm.selection.pages import page_strides

CPU = torch.device("cpu")
LLAMA = Heads(32, 8, 128)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def bench() -> Bench:
    return Bench(CPU, torch.float32, quick=True, seconds=60, started=time.monotonic())


@pytest.fixture
def run(tmp_path):
    """run(*words): the JSON of a run on the CPU."""

    def go(*words: str) -> dict:
        out = tmp_path / "kernels.json"
        # However busy the machine is: what would begin late is not to be skipped.
        kernels.run(arguments("--device", "cpu", "--quick", "--seconds", "600", "--out", str(out), *words))
        return json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return go


def test_the_command_line_loads_no_torch():
    code = (
        "import argparse, sys; from specattn_vllm.bench import kernels; p = argparse.ArgumentParser();"
        "kernels.add_arguments(p); p.parse_args(['--quick']); sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("text", "batch"), [("16x32k", Batch(16, 32768)), (" 3X500 ", Batch(3, 500))])
def test_a_grid_entry_is_read_and_printed(text, batch):
    assert shapes.parse_batch(text) == batch
    assert str(batch) == text.strip().lower()


@pytest.mark.parametrize(
    "words",
    [("--grid", "16"), ("--grid", "0x4k"), ("--grid", "2x13"), ("--grid", "4x1m"), ("--kept", "0"), ("--kept", "1.5"),
     ("--kept", "a"), ("--only", "verify,dense"), ("--group", "0"), ("--group", "all")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        arguments(*words)
    assert "wanted" in capsys.readouterr().err


def test_bytes_of_attention():
    batch = Batch(16, 32768)
    kv = 16 * 32768 * 8 * 2 * 128 * 2
    assert kv == 2_147_483_648
    q_and_out = 2 * (16 * 6 * 32 * 128 * 2)
    assert shapes.dense_bytes(LLAMA, batch, 6, 2) == kv + q_and_out + 16 * 2048 * 4
    # 3277 entries per request; a table of 3277 ids and a count for each request, or for each of its 8 heads.
    kept = 16 * 3277 * 8 * 2 * 128 * 2
    assert shapes.sparse_bytes(LLAMA, batch, 6, 2, 3277, 1) == kept + q_and_out + 16 * 3278 * 4
    assert shapes.sparse_bytes(LLAMA, batch, 6, 2, 3277, 8) == kept + q_and_out + 16 * 8 * 3278 * 4
    # The last block of a request is read through one more entry.
    assert shapes.dense_bytes(Heads(2, 1, 64), Batch(1, 33), 1, 4) == 33 * 2 * 64 * 4 + 2 * 2 * 64 * 4 + 3 * 4


def test_bytes_of_capture_selection_and_pruning():
    heads = Heads(32, 8, 64)
    scores = 4 * 32 * (1000 * 2 + 4)
    assert shapes.score_bytes(heads, 4, 1000, 2) == scores
    assert shapes.mass_bytes(heads, 4, 1000, 2, 1, "store") == scores + 4 * 1000 * 4
    assert shapes.mass_bytes(heads, 4, 1000, 2, 8, "add") == scores + 2 * 4 * 8 * 1000 * 4
    assert shapes.select_bytes(256, 32768) == 256 * (131072 + 4096 + 4)
    assert shapes.sort_bytes(10, 100) == 10 * 100 * 16
    assert shapes.topk_bytes(10, 100, 7) == 10 * (400 + 84)
    # 33 tokens: 2 words of bits and 3 blocks.
    assert shapes.page_table_bytes(Batch(2, 33), 3, 8, 10) == 3 * 2 * 8 * 8 + 2 * 3 * 4 + 3 * 2 * 8 * 11 * 4
    assert shapes.position_bytes(Batch(2, 33), 3, 10) == 3 * 2 * (8 + 44)


def test_bytes_of_a_search():
    batch = Batch(16, 32768)
    context = 32768 - 6
    packed = 16 * 8 * 32 * (128 + 12)
    # A token's codes of 2 bits and its scale in, a byte of score out; histograms of the context and of 16 chunks.
    scan = 16 * 8 * (context * (34 + 1) + 1024 + 16 * 512) + packed + 16 * 2048 * 4
    assert shapes.scan_bytes(LLAMA, batch, 34, 32) == scan
    sampled = 16 * 8 * 512 * 34
    assert shapes.prepare_bytes(LLAMA, batch, 2, 34, 32) == 16 * 6 * 32 * 128 * 2 + sampled + packed + 16 * 8 * 1024
    # A context shorter than the sample is sampled whole.
    assert shapes.prepare_bytes(Heads(2, 1, 64), Batch(1, 106), 4, 18, 16) == (
        6 * 2 * 64 * 4 + 100 * 18 + 16 * (64 + 12) + 1024
    )
    assert shapes.carry_bytes(batch) == 16 * (2 * 258 * 4 + 8)
    assert shapes.cut_bytes(LLAMA, batch) == 16 * 8 * (1024 + 16 * (512 + 8) + 8)
    assert shapes.list_bytes(LLAMA, batch, 2622) == 16 * (8 * (context + 2623 * 4) + 2048 * 4)
    assert shapes.encode_bytes(LLAMA, 96, 2, 34) == 96 * (8 * (4 * 256 + 34) + 8) + 128 * 128 * 2


def test_constants_of_a_search_are_the_kernels():
    assert shapes.SAMPLED_TOKENS == contracts.MAX_SAMPLE
    assert shapes.SCORED_CHUNK == contracts.CHUNK
    assert shapes.HISTOGRAM_BYTES == contracts.BINS * 4


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("context", "fraction", "kept"), [(1000, 0.1, 100), (1000, 0.25, 250), (96, 0.05, 8)])
def test_a_selection_has_the_fraction_asked_for(groups, context, fraction, kept):
    batch = Batch(3, context)
    assert shapes.kept_tokens(context, fraction) == kept
    positions = data.random_positions(batch, groups, kept, CPU)
    assert positions.shape == (3, groups, kept)
    assert (positions.diff(dim=-1) > 0).all(), "ascending, each once"
    assert int(positions.min()) >= 0
    new = torch.arange(context - shapes.FIRST_STEP_LEN, context)
    assert (positions[..., -shapes.FIRST_STEP_LEN :] == new).all(), "new tokens are the last entries"
    rows = positions.flatten(0, 1).tolist()
    if kept > 50:  # few tokens may well be the same ones
        assert len({tuple(row) for row in rows}) == len(rows), "requests and heads choose for themselves"


def test_uniform_positions_leave_no_part_of_the_context_out():
    positions = data.random_positions(Batch(8, 4000), 1, 400, CPU)[..., : -shapes.FIRST_STEP_LEN]
    by_quarter = torch.histc(positions.float(), bins=4, min=0, max=4000)
    assert by_quarter.min() > 0.8 * by_quarter.mean()


@pytest.mark.parametrize("groups", [1, 2])
def test_page_ids_lead_to_the_chosen_tokens(groups):
    heads, batch = Heads(4, 2, 64), Batch(2, 50)
    cache = data.Arena(CPU, torch.float32).layers(heads, batch)[0]
    req = data.requests(heads, batch, 1, CPU, torch.float32)
    positions = data.random_positions(batch, groups, 12, CPU)
    strides = page_strides(cache)
    table = data.page_table(positions, req.block_table, strides, 125)
    assert table.shape == (2, groups, 125)
    assert table.dtype == torch.int32
    pages = cache.transpose(1, 2).reshape(-1, 128)  # tokens lie outermost
    for r in range(2):
        for head in range(2):
            shared = groups == 1
            ids = table[r, 0 if shared else head, :12] + (head * strides[1] if shared else 0)
            p = positions[r, 0 if shared else head]
            wanted = cache[req.block_table[r, p // 16].long(), head, p % 16]
            assert torch.equal(pages[ids.long()], wanted)


def test_layers_share_one_memory_that_grows():
    arena = data.Arena(CPU, torch.float32)
    small = arena.layers(Heads(2, 1, 64), Batch(1, 40))
    assert [tuple(layer.shape) for layer in small] == [(3, 1, 16, 128)] * 2
    assert small[0].data_ptr() != small[1].data_ptr()
    assert arena.layers(Heads(2, 1, 64), Batch(1, 30))[0].data_ptr() == small[0].data_ptr()
    assert arena.layers(Heads(2, 1, 64), Batch(4, 40))[1].isfinite().all()


def test_layers_have_room_behind_their_blocks():
    [layer, _] = data.Arena(CPU, torch.float32).layers(Heads(4, 2, 64), Batch(2, 40), tail=5 * 128)
    assert layer.shape == (6, 2, 16, 128)
    assert layer.stride() == (16 * 2 * 128 + 5 * 128, 128, 2 * 128, 1)
    codes, scales = sketch_views(layer, 2)
    before = layer.clone()
    codes.fill_(255)
    scales.fill_(7)
    assert torch.equal(layer, before)


def test_as_many_operands_as_exceed_the_cache():
    assert data.layer_count(2 << 30, wanted=6 << 30) == 3
    assert data.layer_count(1 << 20, limit=20, wanted=6 << 30) == 20
    assert data.layer_count(64 << 30, wanted=6 << 30) == 1


def test_packed_bits_are_those_of_the_positions():
    positions = data.random_positions(Batch(3, 70), 2, 20, CPU)
    bits = data.pack_bits(positions, 70)
    assert bits.shape == (3, 2, 3)
    wanted = torch.zeros(3, 2, 96, dtype=torch.bool).scatter_(-1, positions, True)
    assert torch.equal(reference.unpack_bits(bits, 96), wanted)


def test_mass_is_what_selection_expects():
    mass = data.realistic_mass(40, 2000, CPU)
    sums = mass.sum(-1)
    assert (mass >= 0).all()
    assert ((sums > 0.99) & (sums < 1)).all()
    top = mass.sort(-1, descending=True).values[:, :200].sum(-1)
    assert 0.7 < float(top.mean()) < 0.98, "a tenth of the tokens holds most of the mass, not all of it"


def test_a_rate_is_bytes_over_time(bench, monkeypatch):
    monkeypatch.setattr(bench, "clock", lambda calls: timing.Timing(2.0, 1.9, 2.1, 5, 1, "wall"), raising=True)
    bench.clock.l2 = 0
    bench.copy_gb_per_s = 100.0
    row = bench.measure("verify", "case", "1x1", lambda: [lambda: None], 50_000_000, kept=0.1)
    assert (row.ms, row.ms_p10, row.ms_p90, row.gb_per_s, row.share_of_copy) == (2.0, 1.9, 2.1, 25.0, 0.25)
    assert row.bound_ms == 0.5
    assert row.parameters == {"kept": 0.1}
    assert row.note is None
    fast = bench.measure("verify", "case", "1x1", lambda: [lambda: None], 500_000_000)
    assert "faster than memory" in fast.note


@pytest.mark.parametrize(
    ("target", "met"),
    [({"speedup": 4.0}, True), ({"speedup": 4.1}, False), ({"time_ratio": 0.25}, True), ({"time_ratio": 0.2}, False)],
)
def test_a_comparison_says_whether_the_target_is_met(target, met):
    slow, fast = report.Row("g", "slow", "s", ms=8.0), report.Row("g", "fast", "s", ms=2.0)
    fast.compare(slow, target)
    assert (fast.against, fast.speedup, fast.time_ratio, fast.target_met) == ("slow", 4.0, 0.25, met)
    assert ("met" if met else "MISSED") in report.cells(fast)[-1]


def test_nothing_is_compared_with_what_was_not_measured():
    row = report.Row("g", "fast", "s", ms=2.0)
    row.compare(report.Row("g", "gone", "s", error="no"), {"speedup": 2.0})
    assert (row.against, row.speedup, row.target_met) == (None, None, None)
    assert report.best([None, report.Row("g", "gone", "s", skipped="no"), row]) is row
    assert report.best([None]) is None


def test_one_case_that_fails_does_not_end_the_others(bench):
    def broken() -> None:
        raise ValueError("query: got 3, wanted 4\nand more")

    bad = bench.measure("verify", "bad", "s", lambda: [broken], 8)
    also_bad = bench.measure("verify", "no inputs", "s", lambda: 1 / 0, 8)
    skipped = bench.measure("verify", "skipped", "s", lambda: (_ for _ in ()).throw(Skip("needs CUDA")), 8)
    good = bench.measure("verify", "good", "s", lambda: [lambda: None], 8)
    assert bad.error == "ValueError: query: got 3, wanted 4"
    assert also_bad.error.startswith("ZeroDivisionError")
    assert (skipped.skipped, skipped.error) == ("needs CUDA", None)
    assert good.ms > 0
    assert bench.rows == [bad, also_bad, skipped, good]
    text = report.table(bench.rows)
    assert "ERROR ValueError: query: got 3, wanted 4" in text
    assert "skipped: needs CUDA" in text


def test_after_a_fault_nothing_more_is_tried(bench, monkeypatch):
    def fault(calls):
        raise timing.ContextLost("an illegal memory access was encountered")

    monkeypatch.setattr(bench, "clock", fault)
    assert "illegal memory access" in bench.measure("verify", "a", "s", lambda: [lambda: None], 8).error
    after = bench.measure("verify", "b", "s", lambda: pytest.fail("ran"), 8)
    assert "context was lost" in after.skipped


def test_what_would_begin_too_late_is_skipped():
    bench = Bench(CPU, torch.float32, quick=True, seconds=10, started=time.monotonic() - 11)
    assert "10 s were over" in bench.measure("verify", "a", "s", lambda: pytest.fail("ran"), 8).skipped


@pytest.mark.parametrize(("error", "kept"), [(0.5, 0.5), (float("nan"), None)])
def test_a_wrong_result_is_said_next_to_its_time(bench, error, kept):
    row = bench.measure("verify", "a", "s", lambda: [lambda: None], 8, check=lambda: error)
    assert row.relative_error == kept
    assert "RESULT DIFFERS" in row.note
    assert bench.measure("verify", "a", "s", lambda: [lambda: None], 8, check=lambda: 0.001).note is None


def test_a_check_that_fails_is_a_note(bench):
    row = bench.measure("verify", "a", "s", lambda: [lambda: None], 8, check=lambda: 1 / 0)
    assert "not checked: ZeroDivisionError" in row.note
    assert row.ms > 0


def test_relative_error_sees_nan():
    ones = torch.ones(4)
    assert relative_error(ones, ones) == 0
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert not relative_error(torch.tensor([1.0, torch.nan, 1, 1]), ones) <= 1


def test_the_summary_of_samples():
    got = timing.summary([5.0, 1.0, 2.0, 3.0, 100.0, 4.0, 6.0, 7.0, 8.0, 9.0, 0.5], 20, "graph")
    assert got == timing.Timing(5.0, 1.0, 9.0, 11, 20, "graph")


def test_a_run_on_the_cpu(run, capsys):
    result = run("--commit", "abc1234")
    assert set(result) == {"schema", "provenance", "settings", "copy_gb_per_s", "seconds_taken", "rows"}
    assert result["schema"] == report.SCHEMA
    where = result["provenance"]
    assert where["commit"] == "abc1234"
    assert where["gpu"] is None
    assert where["versions"]["torch"] == torch.__version__
    assert {"date", "command", "threads"} <= set(where)
    assert result["settings"]["quick"] is True
    assert result["settings"]["dtype"] == "float32"
    rows = result["rows"]
    assert {row["group"] for row in rows} == set(kernels.GROUPS)
    for row in rows:
        assert set(row) == set(asdict(report.Row("", "", "")))
        assert sum(row[name] is not None for name in ("ms", "error", "skipped")) == 1, row
        assert row["error"] is None, row
    assert result["copy_gb_per_s"] == rows[0]["gb_per_s"] > 0
    by_case = {row["case"]: row for row in rows}
    for case in ("fa3 dense", "fa3 10%, per head", "xformers 10%, blocks"):
        assert "needs CUDA" in by_case[case]["skipped"]
    for case in ("reference 10%, shared", "draft_attention", "torch.sort", "build_page_tables", "build_positions",
                 "selection + pruning of a round", "score_tokens",
                 "search and attention of a layer, 8%"):  # fmt: skip
        assert by_case[case]["ms"] > 0, by_case[case]
    # 2 requests of 100 tokens, 4 query and 2 KV heads of size 64, fp32; 10 tokens kept; 6 query rows.
    shared = by_case["reference 10%, shared"]
    assert shared["parameters"]["kept_tokens"] == 10
    assert shared["bytes"] == 2 * 10 * 2 * 128 * 4 + 2 * 2 * 6 * 4 * 64 * 4 + 2 * 11 * 4
    assert shared["against"] == "reference dense"
    assert shared["relative_error"] == 0
    assert all(row["target"] is None for row in rows), "targets are a GPU's"
    total = by_case["selection + pruning of a round"]
    assert total["ms"] == pytest.approx(sum(total["parameters"]["parts"].values()), abs=1e-4)
    printed = capsys.readouterr().out
    assert "== verify" in printed
    assert "0 errors" in printed


def test_a_search_is_measured_operation_by_operation(run):
    rows = run("--only", "sketch", "--kept", "0.2,0.1")["rows"]
    assert [row["error"] for row in rows if row["error"]] == []
    by_case = {row["case"]: row for row in rows if row["ms"] is not None}
    for case in ("encode_keys", "prepare_queries", "score_tokens", "carry_thresholds, once a step"):
        assert sum(row["case"] == case for row in rows) == 1, "whatever is kept"
    scan = by_case["score_tokens"]
    assert scan["shape"] == "2x100 4/2h d64 q6"
    # 2 requests with 94 tokens before the step's own, 2 KV heads of 64: 16 bytes of codes and a scale of 2, a score.
    packed, histograms = 2 * 2 * 16 * (64 + 12), 2 * 2 * (1024 + 512)
    assert scan["bytes"] == 2 * 2 * 94 * 19 + packed + histograms + 2 * 7 * 4
    assert scan["bound_ms"] == pytest.approx(scan["bytes"] / rows[0]["gb_per_s"] / 1e6, abs=1e-5)
    assert scan["relative_error"] == 0
    for share, kept in ((20, 19), (10, 10)):
        attention = by_case[f"sparse_attention, {share}%"]
        assert attention["parameters"]["kept_tokens"] == kept + 6
        assert attention["relative_error"] == 0
        assert attention["against"] == "reference dense"
        searched, both = by_case[f"search of a layer, {share}%"], by_case[f"search and attention of a layer, {share}%"]
        parts = {"prepare_queries", "score_tokens", f"cut_scores, {share}%", f"list_pages, {share}%"}
        assert set(searched["parameters"]["parts"]) == parts
        assert searched["ms"] == pytest.approx(sum(by_case[part]["ms"] for part in parts), abs=1e-4)
        assert both["ms"] == pytest.approx(searched["ms"] + attention["ms"], abs=1e-4)


def test_each_operation_of_a_search_is_given_what_those_before_it_made(bench):
    it = kernel_sketch.Search(bench, Heads(4, 2, 64), Batch(2, 100), 0.2)
    calls = it.calls_of("list_pages")
    assert len(calls) == len(it.layers) == 2
    it.sketch.page_table.zero_()
    assert not it.sketch.page_table.any(), "the operation itself is left to the clock"
    calls[1]()
    listed = it.sketch.page_table.clone()
    table, kept = it.select(1)
    assert (kept < 100).all(), "a part is read"
    for row, head in ((0, 0), (1, 1)):
        number = int(kept[row, head])
        assert torch.equal(listed[0, row, head, :number], table[row, head, :number])


def test_a_search_is_measured_as_in_a_step_that_follows_others(bench):
    it = kernel_sketch.Search(bench, Heads(4, 2, 64), Batch(2, 100), 0.2)
    [*calls] = it.calls_of("cut_scores")
    assert (it.sketch.thresholds[:2] >= 0).all(), "each request has one of its own carried over"
    assert (it.sketch.thresholds[2:] == -1).all()
    totals = it.sketch.totals[:2].sum()
    calls[0]()
    assert it.sketch.totals[:2].sum() > totals
    assert len(it.calls_of(kernel_sketch.ONCE)) == 1


def test_an_operation_that_raises_leaves_those_before_it(run, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(sketch_reference, "cut_scores", broken)
    rows = {row["case"]: row for row in run("--only", "sketch")["rows"]}
    assert rows["score_tokens"]["ms"] > 0
    assert rows["cut_scores, 8%"]["error"] == rows["list_pages, 8%"]["error"] == "RuntimeError: out of registers"
    assert "cut_scores, 8%" in rows["search of a layer, 8%"]["skipped"]


def test_only_what_is_asked_for_is_measured(run):
    rows = run("--only", "select", "--grid", "1x64")["rows"]
    assert {row["group"] for row in rows} == {"copy", "select"}
    assert all(row["shape"].startswith("1x64") for row in rows if row["group"] == "select")


def test_query_heads_of_a_draft_are_those_asked_for(run):
    rows = run("--only", "draft", "--group", "8")["rows"]
    assert {row["shape"].split(" d64")[0] for row in rows if row["group"] == "draft"} == {"2x100 16/2h"}


def test_kept_fractions_are_those_asked_for(run):
    rows = run("--only", "verify", "--grid", "1x400", "--kept", "0.5,0.03")["rows"]
    kept = {
        row["parameters"].get("kept_tokens") for row in rows if row["case"].startswith("reference") and row["against"]
    }
    assert kept == {200, 12}


def test_a_kernel_that_raises_is_a_row(run, monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(reference, "sparse_attention", broken)
    monkeypatch.setattr(reference, "build_page_tables", broken)
    rows = run("--only", "verify,draft,select,prune")["rows"]
    failed = {row["case"] for row in rows if row["error"] == "RuntimeError: out of registers"}
    assert {"reference 10%, per head", "reference 10%, shared", "build_page_tables"} <= failed
    assert {"reference dense", "draft_attention"} <= {row["case"] for row in rows if row["ms"] is not None}
    total = next(row for row in rows if row["case"] == "selection + pruning of a round")
    assert "not measured: build_page_tables" in total["skipped"]


def test_a_group_whose_inputs_fail_is_a_row(run, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(data.Arena, "layers", full)
    rows = run("--only", "verify,select")["rows"]
    assert "80 GiB" in next(row["error"] for row in rows if row["group"] == "verify")
    assert any(row["ms"] for row in rows if row["group"] == "select")


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(cli.UserError, match="--device cpu"):
        kernels.run(arguments("--quick"))


@dataclass(frozen=True)
class Config:
    block_n: int
    num_warps: int
    num_stages: int
    waves: int
    other: int = 7


def far(config: Config) -> float | None:
    """Fastest at (128, 8, 2, 8); one value does not compile."""
    if config.num_stages == 3:
        return None
    return (
        1 + abs(config.block_n - 128) / 64 + abs(config.num_warps - 8) + abs(config.num_stages - 2) + 8 / config.waves
    )


def test_a_sweep_finds_the_best_and_survives_what_does_not_compile():
    top, ms = sweep.descend(Config(64, 4, 4, 4), far, time.monotonic() + 60)
    assert top == Config(128, 8, 2, 8)
    assert ms == far(top)
    assert sweep.descend(Config(64, 4, 3, 4), far, time.monotonic() + 60)[0] == top


def test_a_sweep_tries_nothing_twice_and_ends_in_time():
    seen = []

    def watch(config: Config) -> float:
        seen.append(config)
        return 1.0  # nothing is better, so nothing is preferred

    start = Config(64, 4, 3, 4)
    assert sweep.descend(start, watch, time.monotonic() + 60) == (start, 1.0)
    assert len(set(seen)) == len(seen) > 5
    seen.clear()
    assert sweep.descend(start, watch, time.monotonic() - 1) == (start, 1.0)
    assert seen == [start]


def test_a_sweep_starts_where_the_kernel_does():
    module = SimpleNamespace(__name__="m", launch_config=lambda size, rows: Config(size, rows, 1, 1))
    pick = module.launch_config
    config, key = sweep.chosen_config(module, lambda: module.launch_config(64, 16))
    assert (config, key) == (Config(64, 16, 1, 1), (64, 16))
    assert module.launch_config is pick, "put back"
    with pytest.raises(Skip, match="no launch_config"):
        sweep.chosen_config(SimpleNamespace(__name__="m"), lambda: None)


def test_a_sweep_gives_constants(bench, monkeypatch):
    tried = []

    def make(config):
        tried.append(config)
        return [lambda: None]

    module = SimpleNamespace(__name__="m", launch_config=lambda size: Config(64, 4, 4, 4))
    monkeypatch.setattr(sweep.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(sweep, "chosen_config", lambda module, call: (Config(64, 4, 4, 4), (64, 16)))
    clock = SimpleNamespace(l2=0)
    monkeypatch.setattr(
        type(bench), "measure",
        lambda self, group, case, shape, make, nbytes, against=None: report.Row(
            group, case, shape, ms=(make(), far(tried[-1] or Config(64, 4, 4, 4)))[1]
        ),
    )  # fmt: skip
    bench.clock = clock
    case = sweep.Case("draft_attention", "draft", "16x32k", 8, make)
    comment, constant = sweep._best_of(bench, case, time.monotonic() + 60)
    assert "draft, 16x32k: " in comment
    assert "x the one before" in comment
    assert constant == f"(64, 16): {Config(128, 8, 2, 8)!r},"


def test_a_sweep_without_kernels_says_so(run):
    result = run("--sweep")
    assert result["constants"] == []
    assert {row["group"] for row in result["rows"]} == {"copy", "sweep"}


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@on_gpu
def test_a_copy_is_timed_in_a_graph():
    clock = timing.Clock(torch.device("cuda"))
    source = torch.randn(1 << 28, device="cuda")
    target = torch.zeros_like(source)
    got = clock([lambda: target.copy_(source)])
    assert got.how == "graph"
    assert got.calls > 1
    assert torch.equal(source, target)
    assert 0.1e12 < 2 * source.nbytes / (got.ms / 1e3) < 20e12, "bytes per second of device memory"
    # The same work twice takes twice as long: launches and gaps are not what is measured.
    twice = clock([lambda: (target.copy_(source), target.copy_(source))])
    assert 1.5 < twice.ms / got.ms < 3  # the GPU may not be ours alone


@pytest.mark.gpu
@on_gpu
def test_what_cannot_be_captured_is_timed_and_says_so():
    clock = timing.Clock(torch.device("cuda"))
    ones = torch.ones(1 << 20, device="cuda")
    got = clock([lambda: ones.sum().item()])
    assert got.how == "events"
    assert "not captured" in got.note
    assert float(torch.randn(1000, device="cuda").std()) > 0.5, "random numbers still come"
    assert clock([ones.zero_]).how == "graph"


@pytest.mark.gpu
@on_gpu
def test_a_quick_run_on_the_gpu(tmp_path):
    out = tmp_path / "kernels.json"
    kernels.run(arguments("--quick", "--grid", "2x2k", "--out", str(out)))
    rows = json.loads(out.read_text())["rows"]
    assert {row["group"] for row in rows} == set(kernels.GROUPS)
    assert [row["error"] for row in rows if row["error"]] == []
    assert [row["note"] for row in rows if row["note"] and "DIFFERS" in row["note"]] == []
    assert any(row["timing"] == "graph" for row in rows if row["group"] == "draft")

"""Times of kernels in the documents are those of docs/results."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text()


def test_the_kernels_figures_are_those_measured():
    rows = json.loads((ROOT / "docs/results/h200-kernels.json").read_text())["rows"]
    row = {(r["case"], r["shape"], (r["against"] or "").split(" ")[0]): r for r in rows}
    text = BENCHMARKS

    def faster(case: str, rows: str, against: str) -> str:
        return f"{row[case, f'16x32k {rows}', against]['speedup']:.1f}x"

    verify = [
        faster(f"{case} 10%, {which}", "32/8h d128 q6", "fa3")
        for which in ("shared", "per head")
        for case in ("triton", "fa3")
    ]
    words = "{} by our kernel and {} by FlashAttention 3 with one selection for all heads; {} and {} with one for each"
    assert words.format(*verify) in text
    for case, words in (
        ("select_top_p, cap 10%", "a tenth: **{} and {}** (2,048 rows: **{} and {}**)"),
        ("select_top_p, top_p 0.9", "`top_p` 0.9: **{} and {}** (**{} and {}**)"),
    ):
        sizes = ("256 rows", "2048 rows")
        figures = [faster(case, size, against) for size in sizes for against in ("torch.sort", "torch.topk")]
        assert words.format(*figures) in text
    scored = "draft_attention + bf16 scores"
    times = [
        row[scored, f"16x32k {heads}", "draft_attention"]["time_ratio"]
        for heads in ("16/8h d128 q1", "16/8h d128 q7", "32/8h d64 q1", "32/8h d64 q7")
    ]
    words = "{:.2f}x to {:.2f}x with head size 128; **{:.2f}x** with head size 64 and one query row, **{:.2f}x** with"
    assert words.format(*times) in text
    cells = {(r["case"], r["shape"].split(" ")[0]): r["ms"] for r in rows if r["group"] == "verify"}

    def less(ending: str) -> list[int]:
        """Per cent of FlashAttention 3's time, in ascending order."""
        saved = [
            1 - ms / cells[case.replace("triton", "fa3"), cell]
            for (case, cell), ms in cells.items()
            if case.startswith("triton") and case.endswith(ending)
        ]
        return sorted(round(100 * share) for share in saved)

    shared, per_head = less("shared"), less("per head")
    longer = [-share for share in shared if share < 0]
    shorter = [share for share in shared if share >= 0]
    text = " ".join(text.split())
    assert f"takes {per_head[0]} to {per_head[-1]}% less time in all {len(per_head)} cells" in text
    words = (
        f"heads it takes {longer[-1]} to {longer[0]}% more with four requests of 32k or more, and {shorter[0]} to "
        f"{shorter[-1]}% less elsewhere"
    )
    assert words in text


def test_the_times_of_a_search_are_those_measured():
    page = (ROOT / "docs/sketch.md").read_text()
    rows = json.loads((ROOT / "docs/results/h200-sketch-kernels.json").read_text())["rows"]
    ms = {(row["shape"].split()[0], row["case"]): row["ms"] for row in rows}
    parts = (
        "prepare_queries",
        "score_tokens",
        "cut_scores, 8%",
        "list_pages, 8%",
        "search of a layer, 8%",
        "sparse_attention, 8%",
        "fa3 dense",
    )
    for shape in ("16x32k", "4x32k", "1x32k", "4x128k"):
        times = " | ".join(f"{ms[shape, part]:.4f}" for part in parts)
        assert f"| {shape.replace('x', ' x ')} | {times} |" in page
    scan = json.loads((ROOT / "docs/results/h200-sketch-scan.json").read_text())["ms"]
    many, few = scan["16x32k, 24 query rows"], scan["16x32k, 4 query rows"]
    shipped = "gluon, 4 warps (as shipped)"
    words = " ".join(page.split())
    assert f"**{many[shipped]} ms instead of {many['triton']}** at 16 x 32k" in words
    assert f"{few[shipped]} instead of {few['triton']} with 4 query rows" in words
    search = sum(ms["16x32k", part] for part in (parts[0], *parts[2:4])) + many[shipped]
    assert f"A search of 32 layers at 16 x 32k is then {32 * search:.1f} ms" in words


def test_where_a_round_with_a_sketch_spends_its_time():
    words = " ".join((ROOT / "docs/sketch.md").read_text().split())
    drafted, _ = json.loads((ROOT / "docs/results/h200-sketch-round.json").read_text())["engines"].values()
    kernels = drafted["kernels"]
    scans = kernels["_scores_kernel"]["ms"]
    others = sum(kernels[name]["ms"] for name in ("_queries_kernel", "_cuts_kernel", "_pages_kernel"))
    attention = kernels["_sparse_kernel"]["ms"] + kernels["_combine_kernel"]["ms"]
    products = sum(k["ms"] for name, k in kernels.items() if "nvjet" in name or "splitK" in name)
    assert f"When it was {1000 * drafted['seconds'][2] / drafted['rounds'][2]:.1f}, the scan" in words
    told = f"{products:.1f} ms of matrix products, {scans:.1f} of scans, {others:.1f} of what else a search is, and "
    assert told + f"{attention:.1f} of attention" in words

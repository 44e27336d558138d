"""scripts/trust/drift.py, on the demo pair's target and short texts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).parents[2] / "scripts/trust/drift.py"


def test_the_kl_by_position_of_a_long_text(demo_pair, held_out_code, tmp_path):
    text, out = tmp_path / "text.py", tmp_path / "drift.json"
    text.write_text(held_out_code[:4000])
    size = ["--context", "300", "--positions", "64", "--window", "16", "--draft-tokens", "3"]
    settings = ["--ratios", "0.3", "--every", "2", "--own"]
    command = [sys.executable, "-P", SCRIPT, "--target", demo_pair[0], "--text", text, *size, *settings, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["along held-out text"]
    sparse, fresh, every = (found[f"ratio 0.3{part}"] for part in ("", ", fresh", ", every 2"))
    assert len(sparse["kl"]) == 4 and len(fresh["kl"]) == 1
    assert 0 < every["kl_mean"]["value"] < sparse["kl_mean"]["value"]
    assert sparse["kv_read"] < every["kv_read"] < 1
    # Half of the steps are dense: half of what the others leave out is read.
    assert every["kv_read"] == pytest.approx((1 + sparse["kv_read"]) / 2, abs=0.02)

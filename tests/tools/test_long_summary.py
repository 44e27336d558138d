"""What `scripts/test --long` writes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.engine.test_schedules" name="test_random_schedules[sts]" time="12.4"><properties>
<property name="happened" value="{'steps': 250, 'preempted': 3}"/></properties></testcase>
<testcase classname="tests.engine.test_schedules" name="test_random_schedules[vegas]" time="9">
<failure message="vegas, seed 7: blocks [3] are not held"/></testcase>
<testcase classname="tests.engine.test_faults" name="test_pages[sketch]" time="60"/>
</testsuite></testsuites>"""


def test_steps_are_added_up_and_failures_are_told(tmp_path):
    (tmp_path / "long.xml").write_text(JUNIT)
    command = [sys.executable, "-P", ROOT / "scripts/long_summary.py", tmp_path / "long.xml", tmp_path / "long.json"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.endswith("long.json: 250 steps, 1 failures\n")
    found = json.loads((tmp_path / "long.json").read_text())
    assert found["schedules"]["sts"] == {"outcome": "passed", "seconds": 12, "steps": 250, "preempted": 3}
    assert found["schedules"]["vegas"]["outcome"] == "failure: vegas, seed 7: blocks [3] are not held"
    assert found["faults"] == {"test_faults::test_pages[sketch]": {"outcome": "passed", "seconds": 60}}

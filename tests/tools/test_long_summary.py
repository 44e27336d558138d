"""What `scripts/test --long` writes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.engine.test_schedules" name="test_random_schedules[sts]" time="12.4"><properties>
<property name="happened" value="{'steps': 250, 'preempted': 3}"/>
<property name="seeds" value="[1, 12]"/></properties></testcase>
<testcase classname="tests.engine.test_schedules" name="test_random_schedules[sketch, drafts]" time="12.4"><properties>
<property name="happened" value="{'steps': 5}"/><property name="seeds" value="[1, 1]"/></properties></testcase>
<testcase classname="tests.engine.test_schedules" name="test_random_schedules[vegas]" time="9">
<failure message="vegas, seed 7: blocks [3] are not held"/></testcase>
<testcase classname="tests.engine.test_faults" name="test_pages[sketch]" time="60"><properties>
<property name="injected" value="7"/></properties></testcase>
</testsuite></testsuites>"""


def test_steps_are_added_up_and_failures_are_told(tmp_path):
    (tmp_path / "long.xml").write_text(JUNIT)
    command = [
        sys.executable,
        "-P",
        ROOT / "scripts/trust/long_summary.py",
        tmp_path / "long.xml",
        tmp_path / "long.json",
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.endswith("long.json: 255 steps, 1 failures\n")
    found = json.loads((tmp_path / "long.json").read_text())
    assert found["schedules"]["sts"] == {
        "outcome": "passed",
        "seconds": 12,
        "steps": 250,
        "preempted": 3,
        "seeds": [[1, 12]],
    }
    assert found["steps_by_method"] == {"sts": 250, "vegas": 0, "sketch": 5} and found["faults_injected"] == 7
    assert found["schedules"]["vegas"]["outcome"] == "failure: vegas, seed 7: blocks [3] are not held"
    assert found["faults"] == {"test_faults::test_pages[sketch]": {"outcome": "passed", "seconds": 60, "injected": 7}}

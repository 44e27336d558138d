"""Processes of engines: how far they are is said, they end with what started them, and an interrupt leaves none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from specattn_vllm import cpu_runner
from specattn_vllm.tools import engines
from specattn_vllm.tools.interrupts import Terminated, resumed

JOBS = [SimpleNamespace(name=name) for name in "abc"]


def test_which_of_how_many_begins_and_what_is_left_is_said():
    said, kept = [], []
    engines.run_each("engine", JOBS, lambda job, gpu, stop: (job.name, gpu), kept.append, said.append)
    assert kept == [("a", None), ("b", None), ("c", None)]
    assert [line for line in said if "left" not in line] == ["engine 1 of 3: a", "engine 2 of 3: b", "engine 3 of 3: c"]
    left = [line for line in said if "left" in line]
    assert left == ["1 of 3 done, about 0:00:00 left", "2 of 3 done, about 0:00:00 left"]


def test_as_many_run_at_a_time_as_there_are_gpus():
    together, kept = threading.Barrier(2), []

    def run(job, gpu, stop):
        together.wait(timeout=10)  # broken, and so an error, if fewer ever run at a time
        return gpu

    engines.run_each("engine", JOBS[:2], run, kept.append, lambda text: None, gpus=["3", "5"])
    assert sorted(kept) == ["3", "5"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, Terminated])
def test_after_an_interrupt_what_runs_is_stopped_and_kept_and_nothing_begins(interrupt):
    kept, said, second = [], [], threading.Event()

    def run(job, gpu, stop):
        if job.name == "b":
            second.set()
            assert stop.wait(10)
        return job.name

    def keep(result):
        kept.append(result)
        if result == "a":
            assert second.wait(10)
            raise interrupt

    with pytest.raises(interrupt):
        engines.run_each("engine", JOBS, run, keep, said.append)
    assert kept == ["a", "b"] and not any(line.endswith(": c") for line in said)


SLEEPER = """
import os, subprocess, sys, time
from pathlib import Path
from specattn_vllm.tools.engines import end_with_the_parent

end_with_the_parent(0.1)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[3]).write_text(f"{os.getpid()} {child.pid} ")
time.sleep(60)
"""
STARTER = """
import os, sys, threading
from pathlib import Path
from pydantic import BaseModel
from specattn_vllm.tools import engines

class Nothing(BaseModel):
    name: str = "x"

folder = Path(sys.argv[1])
command = [sys.executable, "-P", str(folder / "sleeper.py")]
engines.run_job(command, Nothing(), folder, dict(os.environ), threading.Event(), folder / "pids")
"""


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_an_engine_and_its_children_end_with_the_command_that_was_killed(tmp_path):
    for name, text in (("sleeper.py", SLEEPER), ("starter.py", STARTER)):
        (tmp_path / name).write_text(text)
    starter = subprocess.Popen([sys.executable, "-P", str(tmp_path / "starter.py"), str(tmp_path)])
    deadline, pids = time.monotonic() + 60, tmp_path / "pids"
    while not (pids.exists() and pids.read_text().endswith(" ")):
        assert time.monotonic() < deadline and starter.poll() is None
        time.sleep(0.1)
    starter.kill()
    starter.wait()
    while not all(gone(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_engines_see_their_gpu_and_on_a_cpu_the_overlay_without_cpu_env(monkeypatch):
    for name in ("PYTHONPATH", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    found = engines.environment({"OWN": "1"}, cpu=True, gpu="3")
    assert (found["OWN"], found["CUDA_VISIBLE_DEVICES"], found["TRITON_INTERPRET"]) == ("1", "3", "1")
    assert str(cpu_runner.OVERLAY) in found["PYTHONPATH"]
    assert "TRITON_INTERPRET" not in engines.environment({}, cpu=False, gpu=None)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_sigterm_raises_what_ctrl_c_does(number, raised):
    from specattn_vllm.tools.interrupts import ended_as_interrupted

    with pytest.raises(raised), ended_as_interrupted():
        os.kill(os.getpid(), number)
        time.sleep(5)


def test_the_command_that_goes_on_does_not_throw_the_report_away():
    words = ["bench", "--out", "a b.json", "--overwrite"]
    assert resumed("--resume", argv=words) == "specattn bench --out 'a b.json' --resume"

"""What tests of whole runs share."""

from __future__ import annotations

import time

import pytest


@pytest.fixture
def not_running():
    """not_running(pid) -> whether that process has ended, after five seconds at most."""

    def gone(pid: int) -> bool:
        """Gone, or dead and waiting for whoever inherited it."""
        for _ in range(50):
            try:
                with open(f"/proc/{pid}/stat") as file:
                    state = file.read().rpartition(")")[2].split()[0]
            except FileNotFoundError:
                return True
            if state == "Z":
                return True
            time.sleep(0.1)
        return False

    return gone

"""The end of the process that executes a flow: not held by what is left to send."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Prefect's engine, which ends while a service of its own waits for an answer that does not come.
ENGINE = """
import runpy, sys, threading, time
from tidepool.operate import engine

def run_module(*args, **kwargs):
    threading._register_atexit(time.sleep, 600)
    {end}

runpy.run_module = run_module
engine._EXIT_SECONDS = 0.5
engine.main()
"""


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("sys.exit(3)", 3), ("raise ValueError('x')", 1)])
def test_a_process_whose_events_are_not_taken_ends(end: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENGINE.format(end=end)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    assert "events that it has not sent are lost" in done.stderr

"""Prefect's server with a garbage collector that walks through it less often."""

from __future__ import annotations

import gc
import runpy
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tidepool.operate import prefect_server

if TYPE_CHECKING:
    import pytest


def test_it_is_prefects_server_with_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["prefect_server.py", "start", "--port", "4201"])
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: ran.append((name, list(sys.argv), gc.get_threshold())))
    before = gc.get_threshold()
    try:
        prefect_server.main()
    finally:
        gc.set_threshold(*before)
    assert ran == [("prefect", ["prefect", "server", "start", "--port", "4201"], prefect_server.THRESHOLDS)]


def test_its_errors_are_prefects() -> None:
    command = [sys.executable, "-m", "tidepool.operate.prefect_server", "start", "--no-such-option"]
    wrong = subprocess.run(command, capture_output=True, text=True, check=False)
    assert wrong.returncode != 0
    assert "--no-such-option" in wrong.stdout + wrong.stderr

"""`breakpoint()` in a Dask worker's process."""

from __future__ import annotations

import sys

import pytest

from tidepool.compute.worker.breakpoints import refuse_breakpoints
from tidepool.errors import UsageError


def test_a_breakpoint_in_a_worker_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(sys, "breakpointhook", sys.__breakpointhook__)
    refuse_breakpoints()
    with pytest.raises(UsageError, match="`tidepool run --debug NAME` runs everything in one process"):
        sys.breakpointhook()  # noqa: T100 - as breakpoint() calls it


def test_a_debugger_of_the_users_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "breakpointhook", sys.__breakpointhook__)
    monkeypatch.setenv("PYTHONBREAKPOINT", "0")
    refuse_breakpoints()
    assert sys.breakpointhook is sys.__breakpointhook__
    monkeypatch.delenv("PYTHONBREAKPOINT")
    monkeypatch.setattr(sys, "breakpointhook", print)
    refuse_breakpoints()
    assert sys.breakpointhook is print

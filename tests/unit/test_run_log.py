"""The logger of a run before its flow begins."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tidepool.compute.run_log import run_log

if TYPE_CHECKING:
    import pytest

RUN = "0b1d2c3e-5f60-4a7b-8c9d-0e1f2a3b4c5d"


def test_a_line_from_before_the_flow_begins_is_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", RUN)
    log = run_log()
    assert isinstance(log, logging.LoggerAdapter)
    assert log.extra is not None
    assert (log.extra["flow_run_id"], log.extra["flow_run_name"]) == (RUN, "0b1d2c3e")


def test_a_line_of_no_run_is_the_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    assert run_log() is logging.getLogger("prefect.tidepool.compute")

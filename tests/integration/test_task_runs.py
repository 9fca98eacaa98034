"""Final states that the driver records for workers that are lost."""

from __future__ import annotations

import contextvars
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, get_client, task
from prefect.states import Completed, Failed, Pending

from tests.polling import until
from tidepool.compute.run_log import run_log
from tidepool.compute.runner.recorder import Conclusion, Recorder
from tidepool.compute.worker.outcome import Outcome

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(120)]


@task
def item() -> None:
    """Never runs: the driver reports it."""


def _recorded(task_run_id: UUID, states: list[str]) -> Any:
    """The task run, when its history on the server is these states."""
    with get_client(sync_client=True) as client:
        until(lambda: [state.name for state in client.read_task_run_states(task_run_id)], lambda found: found == states)
        return client.read_task_run(task_run_id)


def test_what_was_not_sent_is_recorded_as_it_was() -> None:
    task_run_id, state = uuid4(), Completed(message="All states completed.")
    begun = state.timestamp - timedelta(seconds=3)
    outcome = replace(Outcome.of(state), name="item-1", start_time=begun)

    @flow
    def body() -> None:
        recorder = Recorder(contextvars.copy_context(), run_log())
        recorder.record_unsent([Conclusion(task_run_id, item, {}, outcome)], seconds=0)

    body()
    found = _recorded(task_run_id, ["Pending", "Completed"])
    assert (found.name, found.state.id, found.state.message) == ("item-1", state.id, state.message)
    assert (found.start_time, found.end_time) == (begun, state.timestamp)
    assert (found.run_count, found.total_run_time) == (1, timedelta(seconds=3))


def test_what_was_sent_after_all_is_recorded_once() -> None:
    task_run_id, state = uuid4(), Failed(message="no 7")
    outcome = replace(Outcome.of(state), name="item-7", start_time=datetime.now(UTC) - timedelta(seconds=1))

    @flow
    def body() -> None:
        recorder = Recorder(contextvars.copy_context(), run_log())
        conclusion = Conclusion(task_run_id, item, {}, outcome)
        recorder.record_unsent([conclusion], seconds=0)
        _recorded(task_run_id, ["Pending", "Failed"])
        recorder.record_unsent([conclusion], seconds=0)

    body()
    assert _recorded(task_run_id, ["Pending", "Failed"]).state.id == state.id


def test_one_that_was_not_ready_has_ended_too(caplog: pytest.LogCaptureFixture) -> None:
    """What waits for a failed task run ends Pending: it was taken for unsent, and sent again, each time."""
    task_run_id = uuid4()
    outcome = replace(Outcome.of(Pending(name="NotReady", message="upstream failed")), name="item-3")

    @flow
    def body() -> None:
        recorder = Recorder(contextvars.copy_context(), run_log())
        conclusion = Conclusion(task_run_id, item, {}, outcome)
        assert recorder.record_unsent([conclusion], seconds=0)
        _recorded(task_run_id, ["Pending", "NotReady"])
        assert recorder.record_unsent([conclusion], seconds=60)

    body()
    assert caplog.text.count("that a lost worker had not sent") == 1


def test_a_task_run_that_the_server_knows_is_not_announced_again(caplog: pytest.LogCaptureFixture) -> None:
    first, second = uuid4(), uuid4()

    @flow
    def body() -> None:
        recorder = Recorder(contextvars.copy_context(), run_log())
        recorder.record([Conclusion(first, item, {}, Outcome.of(Failed(message="told")))])
        outcome = replace(Outcome.of(Completed()), name="item-2", start_time=datetime.now(UTC))
        _recorded(first, ["Pending", "Failed"])
        recorder.record_unsent([Conclusion(first, item, {}, outcome), Conclusion(second, item, {}, outcome)], 0)

    body()
    _recorded(second, ["Pending", "Completed"])
    _recorded(first, ["Pending", "Failed"])
    assert "sent the final states of 1 task runs that a lost worker had not sent" in caplog.text

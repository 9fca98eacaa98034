"""The log and the report of a run, as a real server holds them."""

from __future__ import annotations

import json
import re
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
from prefect import flow, get_client, get_run_logger, task
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.flow_engine import AsyncFlowRunEngine, FlowRunEngine

from tests.integration.flow_run_process import Pod
from tests.polling import until
from tidepool import report, storage
from tidepool import settings as settings_module
from tidepool.compute import dask_runner
from tidepool.errors import UnavailableError
from tidepool.report import history, run_record, run_report
from tidepool.upstream import prefect as upstream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from uuid import UUID

    from prefect.client.schemas.objects import Artifact, FlowRun

pytestmark = [pytest.mark.usefixtures("prefect_server", "storage_root"), pytest.mark.timeout(600)]


@pytest.fixture(params=["local", "threads"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TIDEPOOL_COMPUTE_PROVIDER", request.param)
    settings_module.settings.cache_clear()
    yield request.param
    settings_module.settings.cache_clear()


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flow runs of this test report their end; those of other tests do not."""
    for engine in (FlowRunEngine, AsyncFlowRunEngine):
        for name in ("start", "set_state"):
            monkeypatch.setattr(engine, name, getattr(engine, name))
    upstream.follow_flow_runs.cache_clear()
    run_report.install()
    yield
    upstream.follow_flow_runs.cache_clear()


@task
def item(number: int, each: str = "frame") -> int:
    get_run_logger().info("the author's line %d", number)
    if number == 3:
        raise ValueError(f"bad {each}")
    return number


def _run(number: int, *, wait: bool = True, **options: Any) -> FlowRun:
    """A flow run of mapped tasks, one of which fails if there are more than three."""

    @flow(name=options.pop("name", "frames"), task_runner=dask_runner("small"))
    def frames() -> int:
        items = item.map(list(range(number)))
        if wait:  # for all of them: the first that fails ends the run
            items.wait()
        return sum(items.result())

    with get_client(sync_client=True) as client:
        state = frames(return_state=True)
        return client.read_flow_run(state.state_details.flow_run_id)


def _all_lines(run_id: UUID) -> list[str]:
    last = "Finished in state Failed('Flow"
    until(lambda: _lines(run_id), lambda found: any(each.startswith(last) for each in found))
    # Again: a line that is stored between two pages, with a time of the first one, is on neither.
    return _lines(run_id)


def _lines(flow_run_id: UUID) -> list[str]:
    of_the_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))
    found: list[str] = []
    with get_client(sync_client=True) as client:
        while page := client.read_logs(of_the_run, offset=len(found)):
            found += [each.message for each in page]
    return found


def _reports(flow_run_id: UUID) -> list[Artifact]:
    only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        return [each for each in client.read_artifacts(artifact_filter=only) if str(each.key).endswith("-run")]


def test_the_log_of_a_mapped_run_has_progress_and_no_line_for_each_item(provider: str) -> None:
    run = _run(5)
    assert run.state_type == "FAILED"
    lines = _all_lines(run.id)
    # Of the task runs, only the one that failed.
    assert not [each for each in lines if each.startswith("Finished in state Completed")]
    assert sum(each.startswith("the author's line") for each in lines) == 5
    assert [each for each in lines if each.startswith("Mapped tasks: 4 of 5 done, 1 failed")]
    about = {"local": "Dask cluster at tcp://127.0.0.1:", "threads": "Mapped tasks run in up to 2 threads"}
    assert [each for each in lines if each.startswith(about[provider])]
    if provider == "local":
        assert [each for each in lines if "bad frame; item: number=3" in each]


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("provider", ["local"], indirect=True)
def test_items_that_the_run_did_not_wait_for_have_not_failed() -> None:
    lines = _all_lines(_run(100, wait=False).id)
    *_, progress = [each for each in lines if each.startswith("Mapped tasks: ")]
    done = re.match(r"Mapped tasks: (\d+) of 100 done, 1 failed", progress)
    assert done, progress
    cancelled = [each for each in lines if "task runs were not final and are cancelled" in each]
    # A fast worker has done all of them by then.
    assert int(done[1]) == 99 or [each.split()[0] for each in cancelled] == [str(99 - int(done[1]))]


@pytest.mark.usefixtures("threads")
def test_the_level_of_these_lines_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_COMPUTE_TASKS_LOG_LEVEL", "INFO")
    settings_module.settings.cache_clear()
    run = _run(2)
    finished = "Finished in state Completed()"
    until(lambda: [each for each in _lines(run.id) if each.startswith(finished)], lambda found: len(found) >= 2)


@pytest.mark.usefixtures("reported")
def test_a_failed_run_has_a_report_that_names_the_item(provider: str) -> None:
    run = _run(5, name=f"failing {provider}")
    (found,) = _reports(run.id)
    assert found.key == f"failing-{provider}-run"
    assert run.state is not None
    sentence = str(run.state.message)
    assert sentence.startswith("ValueError: bad frame (item")
    assert sentence.endswith("; 1 of 5 items failed")
    text = str(found.data)
    assert text.splitlines()[0].replace("\\", "") == f"# Failed: {sentence}"
    assert str(found.description).startswith(f"Failed: {sentence}")
    assert "**What to do:**" in text
    assert "4 done, 1 failed, 0 not ended" in text
    assert "number=3" in text
    assert ("## Dask cluster" in text) == (provider == "local")
    assert "data:image/svg+xml;base64," in text


@pytest.mark.usefixtures("reported", "threads")
def test_a_completed_run_is_beside_the_earlier_ones_of_its_flow() -> None:
    first, second = _run(2, name="usual"), _run(3, name="usual")
    assert "no Completed run before" in str(_reports(first.id)[0].data)
    text = str(_reports(second.id)[0].data)
    assert text.startswith("# Completed: 3 items done")
    assert "| | this run | median of the last 1 Completed |" in text
    assert "| items | 3 | 2 |" in text
    kept = json.loads(storage.read("runs/usual-run.json"))
    assert [each["id"] for each in kept] == [str(first.id), str(second.id)]


@pytest.mark.usefixtures("reported")
def test_a_warning_of_the_run_is_in_its_state_and_report() -> None:
    @flow(name="warns")
    def warns() -> str:
        report.warn("stale data: 3 weeks old")
        return "done"

    state = warns(return_state=True)
    assert state.is_completed()
    assert state.message == "completed with a warning: stale data: 3 weeks old"
    run = state.state_details.flow_run_id
    assert run is not None
    assert "- Warning: stale data: 3 weeks old" in str(_reports(run)[0].data)


@pytest.mark.usefixtures("reported")
def test_a_coroutine_is_reported_and_its_subflows_are_not() -> None:
    import asyncio

    @flow(name="inner")
    async def inner() -> None:
        raise ValueError("inside")

    @flow(name="outer")
    async def outer() -> None:
        await inner()

    state = asyncio.run(outer(return_state=True))  # type: ignore[arg-type] # Prefect's overloads know no state of a coroutine
    assert state.message == "ValueError: inside"
    run = state.state_details.flow_run_id
    assert run is not None
    assert [each.key for each in _reports(run)] == ["outer-run"]
    with get_client(sync_client=True) as client:
        assert not [each for each in client.read_artifacts() if each.key == "inner-run"]


@pytest.mark.usefixtures("reported")
def test_a_history_that_cannot_be_read_costs_the_usual_figures_only(caplog: pytest.LogCaptureFixture) -> None:
    storage.write("runs/unreadable-run.json", b"not JSON")

    @flow(name="unreadable")
    def unreadable() -> str:
        return "done"

    state = unreadable(return_state=True)
    assert state.is_completed()
    run = state.state_details.flow_run_id
    assert run is not None
    assert len(_reports(run)) == 1
    assert "the history of the runs of unreadable-run cannot be read" in caplog.text


@pytest.mark.usefixtures("reported")
def test_a_store_that_does_not_answer_holds_up_no_report(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = Event()
    monkeypatch.setattr(history, "read", lambda _: answers.wait(60) and [])
    monkeypatch.setattr(run_report, "_HISTORY_SECONDS", 0.2)

    @flow(name="no store")
    def no_store() -> str:
        raise ValueError("no store")

    state = no_store(return_state=True)
    run = state.state_details.flow_run_id
    assert run is not None
    (found,) = _reports(run)
    answers.set()
    assert "| unknown: the store did not answer |" in str(found.data)
    assert "the store has not answered within 0.2 s" in caplog.text


@pytest.mark.usefixtures("reported")
@pytest.mark.parametrize("error", [UnavailableError("the store does not answer"), TimeoutError()])
def test_a_history_that_the_store_does_not_tell_is_not_begun_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(_: str) -> list[Any]:
        raise error

    @flow(name="kept")
    def kept() -> str:
        return "done"

    kept()
    before = storage.read("runs/kept-run.json")
    monkeypatch.setattr(history, "read", refuse)
    state = kept(return_state=True)
    run = state.state_details.flow_run_id
    assert run is not None
    assert len(_reports(run)) == 1
    assert storage.read("runs/kept-run.json") == before


@pytest.mark.usefixtures("reported")
def test_a_run_beyond_its_time_limit_says_what_to_do() -> None:
    """Its state has another name: TimedOut."""

    @flow(name="too slow", timeout_seconds=0.1)
    def too_slow() -> None:
        Event().wait(30)

    state = too_slow(return_state=True)
    run = state.state_details.flow_run_id
    assert run is not None
    told = until(lambda: [each for each in _lines(run) if each.startswith("What to do: ")])
    assert "`timeout_seconds`" in told[0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fails", "ValueError: its own error"),
        ("is_killed", "driver's process "),
        ("ends_at_once", "driver's process ended with exit code 3 and reported no state"),
    ],
)
def test_each_end_in_a_pod_has_one_report_with_the_sentence_of_its_state(
    tmp_path: Path, prefect_server: str, name: str, sentence: str
) -> None:
    pod = Pod(tmp_path / "pod", prefect_server, TIDEPOOL_STORAGE_ROOT=f"file://{tmp_path}/storage")
    executed = pod.execute(name)
    state = executed.flow_run.state
    assert state is not None
    assert str(state.message).startswith(sentence), executed.output
    (found,) = _reports(executed.flow_run.id)
    assert found.key == f"{name.replace('_', '-')}-run"
    assert str(found.data).splitlines()[0].replace("\\", "") == f"# {state.name}: {state.message}"
    assert ("Figures are incomplete: " in str(found.data)) == (name != "fails")
    lines = until(
        lambda: _lines(executed.flow_run.id), lambda found: any(each.startswith("What to do: ") for each in found)
    )
    told = [each for each in lines if each.startswith("What to do: ")]
    assert sum("Traceback" in each for each in lines) == (name == "fails"), lines
    assert [f"\nprefect flow-run retry {executed.flow_run.id}\n" in each for each in told] == [True]
    assert [each for each in lines if each.startswith("Engine execution exited")] == []


def test_a_killed_process_leaves_the_figures_of_its_run(tmp_path: Path) -> None:
    file = str(tmp_path / "run.json")
    record = run_record.begin(file)
    record.submit(2)
    record.end(run_record.Item("one", 1.0, 2.0, "w", 2))
    record.event("Dask cluster with 2 workers")
    run_record.save()
    found, published = run_record.load(file)
    assert (found, published) == (record, False)
    run_record.save(published=True)
    assert run_record.load(file)[1]
    run_record.begin()
    assert run_record.load(str(tmp_path / "missing")) == (run_record.RunRecord(), False)

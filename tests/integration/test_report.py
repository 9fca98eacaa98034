"""What is published is what the Prefect server holds."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest
from prefect import flow, runtime, task
from prefect.artifacts import Artifact
from prefect.client.schemas.objects import Artifact as ArtifactResponse

from tidepool import report, storage

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")

pytestmark = pytest.mark.usefixtures("prefect_server")


def _latest(key: str) -> ArtifactResponse:
    found = Artifact.get(key)
    assert isinstance(found, ArtifactResponse)
    return found


def _publish(publish: Callable[[], R]) -> R:
    """Artifacts belong to a run."""

    @flow
    def publisher() -> R:
        return publish()

    return publisher()


def test_outputs_lists_url_size_and_content(storage_root: str) -> None:
    storage.write("a/1.txt", b"one")
    assert _publish(lambda: report.outputs("report-test", ["a/1.txt"])) == [f"{storage_root}/a/1.txt"]
    found = _latest("report-test-outputs")
    assert isinstance(found.data, str)
    assert f"{storage_root}/a/1.txt" in found.data
    (row,) = json.loads(found.data)
    # The UI cuts off the columns on the right: first what a reader looks for.
    assert list(row) == ["file", "size", "content", "url"]
    assert (row["file"], row["size"]) == ("1.txt", "3 B")
    assert storage.content_hash("a/1.txt").startswith(row["content"])
    assert found.description == "1 file written"


def test_names_tell_runs_apart_and_stay_short() -> None:
    long = f"s3://bucket/{'folder/' * 20}file.csv"

    @task(task_run_name=report.task_name("get {source} and {other}"))
    def get(source: str, other: str) -> None:
        del source, other  # for the name
        names.append(runtime.task_run.name)

    @flow(flow_run_name=report.run_name("add {count} to {source}"))
    def named(source: str, count: int = 1) -> None:
        del count
        names.append(runtime.flow_run.name)
        get(source, source)

    names: list[str] = []
    named(long)
    run, task_run = names
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d · add 1 to ….{31}file\.csv", run), run
    assert len(task_run) == 60
    assert task_run.endswith("…")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB")]
)
def test_sizes_have_units(count: int, text: str) -> None:
    assert report.size(count) == text


def test_a_long_table_is_cut_and_its_description_reports_it() -> None:
    _publish(lambda: report.table("report-test-long", [{"n": n} for n in range(500)], "numbers"))
    found = _latest("report-test-long")
    assert found.description == "numbers (the first 200 of 500 rows)"
    assert isinstance(found.data, str)
    assert '"n": 199' in found.data
    assert '"n": 200' not in found.data


def test_a_page_with_a_picture() -> None:
    figure, axis = report.axes()
    axis.plot([1, 2, 3], [1, 4, 9], label="squares")
    axis.legend()
    text = f"# Squares\n\n{report.picture(figure, 'Squares')}\n"
    _publish(lambda: report.page("report-test-page", text, "three squares"))
    found = _latest("report-test-page")
    assert isinstance(found.data, str)
    assert "![Squares](data:image/png;base64,iVBOR" in found.data


def test_a_page_over_the_limit_is_refused() -> None:
    with pytest.raises(
        ValueError, match="artifact 'report-test-big' has 102401 bytes, more than 102400; write the rest to a file"
    ):
        report.page("report-test-big", "x" * 102401, "too much")
    assert Artifact.get("report-test-big") is None


def test_the_same_figure_is_the_same_picture() -> None:
    def draw() -> str:
        figure, axis = report.axes()
        axis.plot([1, 2], [3, 4])
        return report.picture(figure, "x")

    assert draw() == draw()


def test_progress_is_updated_in_place() -> None:
    def work() -> None:
        progress = report.Progress("report-test-progress", 300, "items")
        for done in range(301):
            progress.update(done)

    _publish(work)
    found = _latest("report-test-progress")
    assert found.data == 100.0
    assert found.description == "items: 300 of 300"


def test_a_server_that_is_too_busy_for_progress_does_not_fail_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten runs at a time on two cores failed with a 500 that a progress bar got."""

    def refuse(**_: Any) -> None:
        request = httpx.Request("PATCH", "http://127.0.0.1/api/artifacts/1")
        raise httpx.HTTPStatusError("500", request=request, response=httpx.Response(500, request=request))

    @flow
    def body() -> str:
        progress = report.Progress("report-busy", 2, "items")
        monkeypatch.setattr("prefect.artifacts.update_progress_artifact", refuse)
        progress.update(1)
        monkeypatch.setattr("prefect.artifacts.create_progress_artifact", refuse)
        report.Progress("report-busy", 2, "items").update(2)
        return "done"

    assert body() == "done"
    assert caplog.text.count("the progress of the run is not shown") == 2

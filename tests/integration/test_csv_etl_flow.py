"""csv-etl against a real Prefect server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.csv_etl import flow as csv_etl_module
from flows.csv_etl.flow import csv_etl
from tests.polling import until
from tidepool import storage
from tidepool.errors import InputError, StorageError

if TYPE_CHECKING:
    import uuid

    from prefect.client.schemas.objects import FlowRun, State

SAMPLES = Path(__file__).parents[2] / "samples"

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(**parameters: object) -> tuple[State[Any], FlowRun]:
    """The final state of a run, and the run."""
    state = csv_etl(**parameters, return_state=True)
    assert state.state_details.flow_run_id is not None
    return state, read_run(state.state_details.flow_run_id)


def read_run(run_id: uuid.UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)


def expect_task_runs(flow_run: FlowRun, **tries: int) -> None:
    """Asserts how often each task was tried; the server learns of it by events, some time after the run has ended."""

    def found() -> dict[str, int]:
        with get_client(sync_client=True) as client:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))
        return {run.task_key.partition("-")[0]: run.run_count for run in runs}

    until(found, lambda tries_found: tries_found == tries)


def test_the_sample(storage_root: str) -> None:
    state, flow_run = run(source=str(SAMPLES / "integers.csv"), increment=-2)

    url = f"{storage_root}/csv_etl/{flow_run.id}/transformed.csv"
    assert state.is_completed()
    assert state.result() == {
        "lines": 4,
        "integers": 10,
        "increment": -2,
        "destination": url,
        "source_updated": False,
    }
    assert storage.read(url) == b"-1,0,1\n38,48,58\n-9,-2,999999999999999999998\n6\n"
    assert storage.listing(storage_root) == [url]
    outputs = Artifact.get("csv-etl-outputs")
    assert outputs is not None
    assert outputs.flow_run_id == flow_run.id
    assert [row["url"] for row in json.loads(str(outputs.data))] == [url]
    lines = Artifact.get("csv-etl-lines")
    assert lines is not None
    assert json.loads(str(lines.data))[0] == {"line": 1, "before": "1,2,3", "after": "-1,0,1"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d · add -2 to .*integers\.csv", flow_run.name)


def test_an_empty_file_is_an_empty_output(storage_root: str, tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()

    state, _ = run(source=str(tmp_path / "empty.csv"), destination="empty/{run_id}.csv")

    summary = state.result()
    assert (summary["lines"], summary["integers"]) == (0, 0)
    assert storage.listing(storage_root) == [summary["destination"]]
    assert storage.read(summary["destination"]) == b""


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"1,2\n3,4\n5,x7\n", "line 3, column 2: 'x7' is not an integer"),
        (b"1,\xff\n", "line 1: byte 3 of it is not UTF-8; expected a CSV of integers"),
    ],
)
def test_a_bad_cell_fails_the_run_at_once(storage_root: str, tmp_path: Path, content: bytes, sentence: str) -> None:
    source = tmp_path / "bad.csv"
    source.write_bytes(content)

    state, flow_run = run(source=str(source))

    assert state.is_failed()
    with pytest.raises(InputError) as caught:
        state.result()
    assert str(caught.value) == f"{source}: {sentence}"
    expect_task_runs(flow_run, extract=1)
    assert storage.listing(storage_root) == []


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"destination": "{runid}.csv"}, "destination: unknown placeholder '{runid}'; the only one is {run_id}"),
        (
            {"destination": "out.csv", "update_source": True},
            "destination: out.csv lacks {run_id}, which update_source requires",
        ),
        (
            {"source": "https://example.org/x.csv", "update_source": True},
            (
                "source: https://example.org/x.csv cannot be written to; with update_source, use a path, or a file or "
                "s3 URL"
            ),
        ),
    ],
)
def test_bad_parameters_are_refused_before_any_work(
    storage_root: str, parameters: dict[str, Any], sentence: str
) -> None:
    state, flow_run = run(**parameters)

    with pytest.raises(InputError) as caught:
        state.result()
    assert str(caught.value) == sentence
    expect_task_runs(flow_run)
    assert storage.listing(storage_root) == []


def test_a_file_of_another_run_is_not_overwritten(storage_root: str) -> None:
    storage.write("fixed.csv", b"another run's\n")

    state, _ = run(source=str(SAMPLES / "integers.csv"), destination="fixed.csv")

    with pytest.raises(StorageError, match=r"fixed\.csv exists with other content and is not overwritten"):
        state.result()
    assert storage.read("fixed.csv") == b"another run's\n"
    assert storage.listing(storage_root) == [f"{storage_root}/fixed.csv"]


@pytest.mark.usefixtures("storage_root")
def test_only_transient_errors_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_etl_module, "extract", csv_etl_module.extract.with_options(retry_delay_seconds=0))
    answers: list[Exception | bytes] = [ConnectionResetError("reset by peer"), TimeoutError("60 s"), b"1\n"]

    def read(_target: str) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(storage, "read", read)
    state, flow_run = run(source=str(SAMPLES / "integers.csv"))
    assert state.is_completed()
    expect_task_runs(flow_run, extract=3, transform=1, load=1)

    answers = [KeyError("a bug"), b"1\n"]
    state, flow_run = run(source=str(SAMPLES / "integers.csv"))
    assert state.is_failed()
    expect_task_runs(flow_run, extract=1)


def test_the_source_is_updated_once_however_often_the_run_is_tried(storage_root: str, tmp_path: Path) -> None:
    source = tmp_path / "numbers.csv"
    source.write_text("1,2\n")

    state, flow_run = run(source=str(source), update_source=True)

    assert state.result()["source_updated"] is True
    assert source.read_text() == "2,3\n"

    again = run_again(flow_run)
    assert again.is_completed()
    assert again.result() == state.result()
    assert source.read_text() == "2,3\n"
    assert storage.listing(storage_root) == [f"{storage_root}/csv_etl/{flow_run.id}/transformed.csv"]


def run_again(flow_run: FlowRun) -> State[Any]:
    """Runs the same flow run once more, as `prefect flow-run retry` does."""
    from prefect.flow_engine import run_flow_sync
    from prefect.states import Scheduled

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Scheduled(), force=True)
    return run_flow_sync(csv_etl, flow_run=read_run(flow_run.id), parameters=flow_run.parameters, return_type="state")

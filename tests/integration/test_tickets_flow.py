"""ticket-model-evaluation against a real Prefect server and a real Dask cluster."""

from __future__ import annotations

import csv
import functools
import http.server
import json
import statistics
import threading
import uuid
import zipfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ParameterTypeError
from prefect.flow_engine import run_flow_sync
from prefect.states import Scheduled

from flows.tickets import flow as tickets_module
from flows.tickets.flow import ticket_model_evaluation
from tests.outputs import outputs
from tests.polling import until
from tidepool import storage
from tidepool.errors import InputError, StorageError, TidepoolError
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.schemas.objects import FlowRun, State

SAMPLE = Path(__file__).parents[2] / "samples" / "incident_event_log.csv"
HEADER = "number,opened_at,sys_created_at,sys_updated_at,resolved_at,priority,closed_at\n"
# 6 h late of a moderate ticket, a day before its update of a low one, and two that are left out
MIXED = (
    HEADER
    + "INC1,?,?,01-02-2016 00:00,?,3 - Moderate,06/02/2016 06:00\n"
    + "INC2,?,?,03/05/2016 06:00,?,4 - Low,02-05-2016 06:00\n"
    + "INC3,?,?,03/05/2016 06:00,?,1 - Critical,?\n"
    + "INC4,?,?,31/02/2016 06:00,?,1 - Critical,03/05/2016 06:00\n"
)
HOUR = 3600.0
EACH_ONCE = {
    name: [1]
    for name in (
        "make_trial_id",
        "draw_batch",
        "compute_target",
        "predict",
        "measure",
        "summarise",
        "write_trial",
        "publish",
    )
}

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(**parameters: object) -> tuple[State[Any], FlowRun]:
    """The final state of a run, and the run."""
    state = ticket_model_evaluation(**parameters, return_state=True)
    return state, read_run(state.state_details.flow_run_id)


def run_again(flow_run: FlowRun) -> State[Any]:
    """Runs the same flow run once more, as `prefect flow-run retry` does."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Scheduled(), force=True)
    return run_flow_sync(
        ticket_model_evaluation,
        flow_run=read_run(flow_run.id),
        parameters=flow_run.parameters,
        return_type="state",
    )


def read_run(run_id: uuid.UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)


def task_runs(flow_run: FlowRun) -> dict[str, list[int]]:
    """How often each task run of a run was tried, by the task's name."""
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))
    tries: dict[str, list[int]] = {}
    for task_run in found:
        tries.setdefault(task_run.task_key.partition("-")[0], []).append(task_run.run_count)
    return tries


def expect_task_runs(flow_run: FlowRun, **tries: list[int]) -> None:
    """Asserts on the task runs of a run; the server learns of them by events, some time after the run has ended."""
    until(lambda: task_runs(flow_run), lambda found: found == tries)


def artifact(key: str, flow_run: FlowRun) -> str:
    """The data of the newest artifact of that key, which the run must have made."""
    found = Artifact.get(f"ticket-model-evaluation-{key}")
    assert found is not None
    assert found.flow_run_id == flow_run.id
    return str(found.data)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of the files in a folder `www`."""
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_whole_sample_equals_an_independent_computation(storage_root: str) -> None:
    state, flow_run = run(source=str(SAMPLE), batch_size=1_000_000)

    expected = {"1 - Critical": 6, "2 - High": 24, "3 - Moderate": 120, "4 - Low": 240}
    with SAMPLE.open(newline="", encoding="utf-8") as lines:
        tickets = list(csv.DictReader(lines))
    actual = np.array(
        [
            (
                datetime.strptime(ticket["closed_at"], "%d-%m-%Y %H:%M")  # noqa: DTZ007 - the data has no zone
                - datetime.strptime(ticket["sys_updated_at"], "%d-%m-%Y %H:%M")  # noqa: DTZ007
            ).total_seconds()
            for ticket in tickets
        ]
    )
    errors = actual - [expected[ticket["priority"]] * HOUR for ticket in tickets]
    r2 = 1 - (errors**2).sum() / ((actual - actual.mean()) ** 2).sum()

    summary = state.result()
    trial = str(uuid.uuid5(flow_run.id, "ticket-model-evaluation"))
    assert summary["id"] == trial
    assert summary["data"].keys() == {"num_obs", "num_dropped", "metrics", "target"}
    assert (summary["data"]["num_obs"], summary["data"]["num_dropped"]) == (5998, 0)
    assert summary["data"]["metrics"] == pytest.approx(
        {
            "MAE": np.abs(errors).mean(),
            "MedAE": statistics.median(np.abs(errors)),
            "MSE": (errors**2).mean(),
            "R2": r2,
        },
        rel=1e-12,
    )
    assert summary["data"]["target"] == pytest.approx(
        {"mean": actual.mean(), "median": statistics.median(actual), "min": actual.min(), "max": actual.max()},
        rel=1e-12,
    )

    url = f"{storage_root}/tickets/trials/{trial}.json"
    assert outputs(storage_root) == [f"{storage_root}/{tickets_module.HISTORY_FILE}", url]
    assert json.loads(storage.read(url)) == summary
    assert [row["url"] for row in json.loads(artifact("outputs", flow_run))] == [url]
    assert json.loads(artifact("history", flow_run))[0]["trial"] == trial
    page = artifact("report", flow_run)
    assert "![MAE, MedAE and RMSE, in hours" in page
    assert url in page
    expect_task_runs(flow_run, **EACH_ONCE)


def test_a_bootstrap_on_the_cluster_gives_the_numbers_of_one_in_the_process(
    storage_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters: dict[str, Any] = {"source": str(SAMPLE), "batch_size": 50, "seed": 7, "resamples": 100}
    here, flow_run = run(**parameters)
    expect_task_runs(flow_run, **EACH_ONCE)

    monkeypatch.setenv("TIDEPOOL_COMPUTE_PROVIDER", "local")
    monkeypatch.setenv("TIDEPOOL_COMPUTE_INLINE_ROWS", "4999")
    settings.cache_clear()
    cluster, flow_run = run(**parameters)

    assert cluster.result()["data"] == here.result()["data"]
    assert cluster.result()["id"] != here.result()["id"]
    intervals = cluster.result()["data"]["intervals"]
    for name, value in cluster.result()["data"]["metrics"].items():
        assert intervals[name][0] <= value <= intervals[name][1]
    expect_task_runs(flow_run, **EACH_ONCE, resample=[1] * tickets_module.SHARES)
    assert "95% interval" in artifact("report", flow_run)
    progress = Artifact.get("ticket-model-evaluation-resamples")
    assert progress is not None
    assert progress.data == 100
    # the rows that the cluster read are gone
    assert storage.listing(f"{storage_root}/tickets/resamples") == []


def test_mixed_dates_and_missing_values_in_a_zip_from_the_web(storage_root: str, web: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "www" / "log.zip", "w") as archive:
        archive.writestr("incident_event_log.csv", MIXED)

    state, flow_run = run(source=f"{web}/log.zip", resamples=10)

    # 126 h against 120 h expected, -24 h against 240 h
    data = state.result()["data"]
    assert (data["num_obs"], data["num_dropped"]) == (2, 2)
    assert data["metrics"]["MAE"] == pytest.approx((6 + 264) / 2 * HOUR)
    assert data["metrics"]["R2"] == pytest.approx(1 - (6**2 + 264**2) / (2 * 75**2))
    assert data["target"] == pytest.approx(
        {"mean": 51 * HOUR, "median": 51 * HOUR, "min": -24 * HOUR, "max": 126 * HOUR}
    )
    assert len(outputs(storage_root)) == 2
    assert "2 tickets, 2 left out" in artifact("report", flow_run)


def test_one_ticket_has_no_r2(storage_root: str, tmp_path: Path) -> None:
    source = tmp_path / "one.csv"
    source.write_text("".join(MIXED.splitlines(keepends=True)[:2]))

    state, _ = run(source=str(source))

    assert state.result()["data"]["metrics"] == {"MAE": 6 * HOUR, "MedAE": 6 * HOUR, "MSE": (6 * HOUR) ** 2, "R2": None}
    assert b'"R2": null' in storage.read(outputs(storage_root)[-1])


@pytest.mark.parametrize(
    ("text", "sentence", "more"),
    [
        ("", "the file is empty; expected a CSV with the columns sys_updated_at, closed_at, priority", []),
        (HEADER, "a header, but no tickets below it", []),
        (
            MIXED.replace("closed_at", "shut"),
            (
                "column 'closed_at' missing; found: number, opened_at, sys_created_at, sys_updated_at, resolved_at, "
                "priority, shut"
            ),
            [],
        ),
        (
            HEADER + "INC3,?,?,03/05/2016 06:00,?,?,?\n",
            (
                "none of the 1 tickets drawn has both sys_updated_at and closed_at (day-month-year hour:minute); "
                "nothing is left to evaluate"
            ),
            ["compute_target"],
        ),
    ],
)
def test_bad_data_fails_the_run_at_once_and_leaves_nothing(
    storage_root: str, tmp_path: Path, text: str, sentence: str, more: list[str]
) -> None:
    source = tmp_path / "bad.csv"
    source.write_text(text)

    state, flow_run = run(source=str(source))

    assert state.is_failed()
    with pytest.raises(InputError) as caught:
        state.result()
    assert str(caught.value) == f"{source}: {sentence}"
    expect_task_runs(flow_run, **{name: [1] for name in ("make_trial_id", "draw_batch", *more)})
    assert outputs(storage_root) == []


def test_a_source_that_is_not_there_is_named(storage_root: str, tmp_path: Path) -> None:
    state, _ = run(source=str(tmp_path / "absent.csv"))
    with pytest.raises(StorageError, match=r"absent\.csv does not exist"):
        state.result()
    assert outputs(storage_root) == []


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1"),
        ({"batch_size": 1_000_001}, "batch_size: Input should be less than or equal to 1000000"),
        ({"resamples": -1}, "resamples: Input should be greater than or equal to 0"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParameterTypeError, match=sentence):
        ticket_model_evaluation.validate_parameters({"source": "x.csv", "seed": None, **parameters})


def test_a_run_that_is_repeated_gives_the_same_file_and_one_line_of_history(storage_root: str) -> None:
    other, _ = run(source=str(SAMPLE), batch_size=20)
    state, flow_run = run(source=str(SAMPLE), batch_size=20)
    files = {url: storage.read(url) for url in outputs(storage_root)}

    again = run_again(flow_run)

    assert again.result() == state.result()
    assert {url: storage.read(url) for url in outputs(storage_root)} == files
    history = [trial["trial"] for trial in json.loads(artifact("history", flow_run))]
    assert history[:2] == [state.result()["id"], other.result()["id"]]
    assert len(set(history)) == len(history) <= tickets_module.HISTORY


@pytest.mark.usefixtures("storage_root")
def test_an_unreadable_history_is_replaced() -> None:
    storage.write(tickets_module.HISTORY_FILE, b'{"another": "writer"}')
    state, flow_run = run(source=str(SAMPLE), batch_size=5)
    assert state.is_completed()
    assert len(json.loads(artifact("history", flow_run))) == 1


@pytest.mark.usefixtures("threads")
def test_a_failed_resample_fails_the_run_and_leaves_nothing(storage_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_COMPUTE_INLINE_ROWS", "0")
    settings.cache_clear()

    def broken(_target: str) -> None:
        raise StorageError("the rows are gone")

    monkeypatch.setattr(storage, "get_frame", broken)
    state, flow_run = run(source=str(SAMPLE), batch_size=5, resamples=1)

    assert state.is_failed()
    with pytest.raises(TidepoolError, match="the rows are gone"):
        state.result()
    drawn = {name: EACH_ONCE[name] for name in ("make_trial_id", "draw_batch", "compute_target", "predict", "measure")}
    expect_task_runs(flow_run, **drawn, resample=[1])
    assert outputs(storage_root) == []

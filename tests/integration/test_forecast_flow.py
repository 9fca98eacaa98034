"""weekly-forecast against a real Prefect server, once on a real Dask cluster."""

from __future__ import annotations

import datetime as dt
import http.server
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ParameterTypeError

from flows.forecast import flow as module
from flows.forecast.flow import RETRY_DELAYS, RETRY_JITTER, get_data, weekly_forecast
from flows.forecast.models import MODEL_NAMES
from tests.outputs import outputs
from tests.polling import until
from tidepool import storage
from tidepool.errors import InputError, StorageError

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prefect.client.schemas.objects import Artifact, State, TaskRun

pytestmark = pytest.mark.usefixtures("prefect_server")

SMALL = {"date_column": "day", "value_column": "level", "horizon": 2, "windows": 2, "models": ["last-value", "drift"]}


def daily(weeks: int, level: Callable[[int], float] = float) -> str:
    first = dt.date(2026, 1, 5)  # a Monday
    days = [f"{first + dt.timedelta(days=day)},{level(day)}" for day in range(7 * weeks)]
    return "\n".join(["day,level", *days, ""])


def run(**parameters: object) -> tuple[State[Any], uuid.UUID]:
    state = weekly_forecast(**parameters, return_state=True)
    assert state.state_details.flow_run_id is not None
    return state, state.state_details.flow_run_id


def artifacts(run_id: uuid.UUID) -> dict[str, Artifact]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
    return {str(artifact.key): artifact for artifact in found}


def predictions() -> list[Artifact]:
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["next-week"])))


def task_runs(run_id: uuid.UUID, expected: int) -> dict[str, TaskRun]:
    """The task runs by name; the server learns of them by events, some time after the run has ended."""

    def found() -> list[TaskRun]:
        with get_client(sync_client=True) as client:
            return client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])), limit=200)

    runs = until(found, lambda runs: len(runs) == expected and all(run.state and run.state.is_final() for run in runs))
    return {run.name: run for run in runs}


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_data", get_data.with_options(retry_delay_seconds=0))


@pytest.fixture
def answers() -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """A web server's URL, and its answers in turn: status and text; the last one is repeated."""
    script: list[tuple[int, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = script.pop(0) if len(script) > 1 else script[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/levels.csv", script
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_co2_series_on_a_dask_cluster(storage_root: str) -> None:
    state, run_id = run()
    assert state.is_completed(), state.message

    summary = state.result()
    mase = {model["model"]: model["mase"] for model in summary["models"]}
    assert set(mase) == set(MODEL_NAMES)
    assert mase[summary["winner"]] == min(mase.values()) < mase["last-value"]
    prediction = summary["prediction"]
    assert prediction["week"] == "2002-01-06"
    assert prediction["low"] < prediction["value"] < prediction["high"]
    assert prediction["errors"] == 32
    assert 371 < prediction["value"] < 373  # the last week was 371.5
    assert summary["series"] == {
        "source": "statsmodels:co2",
        "weeks": 2284,
        "filled": 59,
        "first": "1958-03-30",
        "last": "2001-12-30",
    }

    folder = f"{storage_root}/forecast/{run_id}"
    files = [f"{folder}/{name}" for name in ("backtests.parquet", "series.parquet", "summary.json")]
    assert outputs(storage_root) == files
    assert json.loads(storage.read(files[2])) == summary
    assert len(storage.get_frame(files[0])) == 7 * 4 * 8

    found = artifacts(run_id)
    table = json.loads(str(found["weekly-forecast-models"].data))
    assert [row["model"] for row in table] == sorted(mase, key=mase.__getitem__)
    assert {row["windows"] for row in table} == {"4 of 4"}
    page = str(found["weekly-forecast-report"].data)
    assert "**Warning: stale data: the last week ended on 2001-12-30, " in page
    assert "data:image/png;base64," in page
    assert f"| {summary['winner']} | " in page
    assert {row["url"] for row in json.loads(str(found["weekly-forecast-outputs"].data))} == set(files)
    names = set(task_runs(run_id, expected=1 + 28 + 1 + 4 + 2))
    assert {f"backtest-{model}-{window}" for model in MODEL_NAMES for window in range(1, 5)} <= names
    assert {f"one-step-{summary['winner']}-{window}" for window in range(1, 5)} <= names


@pytest.mark.usefixtures("threads", "storage_root")
def test_every_run_adds_a_prediction_to_the_history() -> None:
    before = len(predictions())
    for model in ("drift", "last-value"):
        state, run_id = run(models=[model], windows=1)
        assert state.is_completed(), state.message
        (row,) = json.loads(str(artifacts(run_id)["next-week"].data))
        assert (row["week ending"], row["model"]) == ("2002-01-06", model)
    assert len(predictions()) == before + 2


@pytest.mark.usefixtures("threads", "no_waits")
def test_transient_errors_are_retried_and_a_failing_model_cannot_win(
    storage_root: str, answers: tuple[str, list[tuple[int, str]]]
) -> None:
    url, script = answers
    script += [(503, "busy"), (200, ""), (200, "day,level\n"), (200, daily(30, lambda day: day + day % 2))]
    state, run_id = run(**SMALL | {"source": url, "models": ["drift", "seasonal-naive"]})
    assert state.is_completed(), state.message

    summary = state.result()
    assert summary["winner"] == "drift"
    assert summary["series"]["weeks"] == 30
    failed = summary["models"][1]
    assert (failed["model"], failed["mase"], failed["windows"]) == ("seasonal-naive", None, 0)
    assert failed["failures"][0] == "window 1: ValueError: needs 52 weeks of history, has 26"
    runs = task_runs(run_id, expected=1 + 4 + 1 + 2 + 2)
    assert runs[f"get {url}"].run_count == 4
    assert {runs[f"backtest-seasonal-naive-{window}"].state_name for window in (1, 2)} == {"ModelFailed"}
    assert runs["backtest-drift-1"].state_name == "Completed"
    (row,) = [
        row
        for row in json.loads(str(artifacts(run_id)["weekly-forecast-models"].data))
        if row["model"] == "seasonal-naive"
    ]
    assert row["windows"] == "0 of 2"
    assert row["remarks"].startswith("failed on window 1: ValueError: needs 52 weeks of history")
    assert len(outputs(storage_root)) == 3


@pytest.mark.usefixtures("threads")
def test_the_same_series_gives_the_same_files(storage_root: str, tmp_path: Path) -> None:
    source = tmp_path / "levels.csv"
    source.write_text(daily(60, lambda day: day % 31), encoding="utf-8-sig")
    hashes = []
    for _time in range(2):
        state, run_id = run(**SMALL | {"source": str(source), "models": list(MODEL_NAMES)})
        assert state.is_completed(), state.message
        folder = f"{storage_root}/forecast/{run_id}"
        hashes.append([storage.content_hash(file) for file in storage.listing(folder)])
    assert len(hashes[0]) == 3
    assert hashes[0] == hashes[1]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("text", "parameters", "sentence"),
    [
        (daily(30), {"value_column": "depth"}, "column 'depth' is missing; found: day, level"),
        (daily(30).replace("2026-01-06", "6.1.2026"), {}, "line 3, column 'day': '6.1.2026' is not an ISO 8601 date"),
        (daily(6), {}, "6 weeks, but 2 windows of 2 weeks need at least 7 in all"),
        ("", {}, "no observations; expected a CSV with columns 'day' and 'level'"),
        ("day,level\n", {}, "no observations; expected a CSV with columns 'day' and 'level'"),
        ("day,level\n2026-01-05,\xe4\n".encode("latin-1"), {}, "line 2: byte 12 of it is not UTF-8; expected a CSV"),
    ],
    ids=["missing column", "date", "too short", "empty", "header only", "encoding"],
)
def test_bad_data_fails_at_once_with_one_sentence_and_leaves_nothing(
    storage_root: str, tmp_path: Path, text: str | bytes, parameters: dict[str, object], sentence: str
) -> None:
    source = tmp_path / "levels.csv"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    state, run_id = run(**SMALL | {"source": str(source)} | parameters)
    assert state.is_failed()
    error = state.result(raise_on_failure=False)
    assert isinstance(error, InputError)
    assert str(error).startswith(f"{source}: {sentence}")
    assert [run.run_count for run in task_runs(run_id, expected=1).values()] == [1]
    assert outputs(storage_root) == []


@pytest.mark.usefixtures("threads")
def test_an_absent_source_is_not_retried(storage_root: str, answers: tuple[str, list[tuple[int, str]]]) -> None:
    url, script = answers
    script.append((404, ""))
    state, _run_id = run(**SMALL | {"source": url})
    error = state.result(raise_on_failure=False)
    assert isinstance(error, StorageError)
    assert str(error) == f"{url} does not exist"
    assert outputs(storage_root) == []


@pytest.mark.usefixtures("threads", "storage_root")
def test_a_run_without_a_winner_fails_but_shows_why(tmp_path: Path) -> None:
    source = tmp_path / "levels.csv"
    source.write_text(daily(30), encoding="utf-8")
    state, run_id = run(**SMALL | {"source": str(source), "models": ["seasonal-naive"]})
    assert state.is_failed()
    error = state.result(raise_on_failure=False)
    assert str(error).startswith("no model forecast every window: seasonal-naive on window 1: ValueError: needs 52")
    found = artifacts(run_id)
    assert str(found["weekly-forecast-models"].description).endswith("no model forecast every window")
    assert "next-week" not in found


@pytest.mark.usefixtures("threads", "storage_root")
def test_data_that_is_too_old_fails_the_run_if_the_deployment_says_how_old_it_may_be() -> None:
    state, run_id = run(horizon=2, windows=2, models=["last-value"], max_age_weeks=52)
    error = state.result(raise_on_failure=False)
    assert isinstance(error, InputError)
    assert "statsmodels:co2: stale data: the last week ended on 2001-12-30, " in str(error)
    assert str(error).endswith("at most 52 weeks are allowed (max_age_weeks)")
    assert "next-week" not in artifacts(run_id)


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({"horizon": 0}, "horizon"),
        ({"windows": 53}, "windows"),
        ({"models": ["prophet"]}, "models"),
        ({"models": []}, "models"),
        ({"source": ""}, "source"),
    ],
)
def test_a_bad_parameter_is_refused_before_any_work(
    storage_root: str, parameters: dict[str, object], names: str
) -> None:
    state = weekly_forecast(**parameters, return_state=True)
    error = state.result(raise_on_failure=False)
    assert isinstance(error, ParameterTypeError)
    assert names in str(error)
    assert outputs(storage_root) == []


def test_parameters_that_hold_out_too_little_are_refused(storage_root: str) -> None:
    state, _run_id = run(horizon=1, windows=3)
    error = state.result(raise_on_failure=False)
    assert isinstance(error, InputError)
    assert str(error) == "horizon 1 and windows 3 hold out 3 weeks; horizon times windows must be at least 4"
    assert outputs(storage_root) == []


def test_the_waits_double_and_never_exceed_a_minute() -> None:
    assert (get_data.retries, len(RETRY_DELAYS)) == (42, 42)
    assert RETRY_DELAYS[:7] == [1, 2, 4, 8, 16, 32, 40]
    # Prefect's jitter adds up to that share on top.
    assert max(RETRY_DELAYS) * (1 + RETRY_JITTER) == 60
    assert get_data.retry_jitter_factor == RETRY_JITTER
    assert sum(RETRY_DELAYS) * (1 + RETRY_JITTER) < (weekly_forecast.timeout_seconds or 0) / 2

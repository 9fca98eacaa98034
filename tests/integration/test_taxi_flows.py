"""taxi-tip-amounts and most-generous-riders against a real Prefect server and real Dask clusters."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.exceptions import ParameterTypeError

from flows.taxi import files, transform
from flows.taxi.flow import clean, most_generous_riders, taxi_tip_amounts
from tests.outputs import outputs
from tests.polling import until
from tidepool import storage
from tidepool.errors import InputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from prefect import Flow
    from prefect.client.schemas.objects import Log, State, TaskRun

    from tests.conftest import Receiver

SAMPLE = Path(__file__).parents[2] / "samples" / "nyc_taxi_2019-03_sample.csv"
WANTED = ("passengers", "tip")
HEADER = "tpep_pickup_datetime,passenger_count,tip_amount,total_amount\n"

pytestmark = [
    pytest.mark.usefixtures("prefect_server", "targets"),
    # Apprise's plug-in for mail looks for a module that Python 3.13 has no more.
    pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning"),
]


def run(flow: Flow[..., Any], **parameters: object) -> tuple[State[Any], UUID]:
    """The final state of a run, and its id."""
    state = flow(**parameters, return_state=True)
    assert state.state_details.flow_run_id is not None
    return state, state.state_details.flow_run_id


def task_runs(run_id: UUID) -> list[TaskRun]:
    with get_client(sync_client=True) as client:
        found: list[TaskRun] = []
        while page := client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])), limit=200, offset=len(found)
        ):
            found += page
        return found


def logs(run_id: UUID) -> list[Log]:
    with get_client(sync_client=True) as client:
        log_filter = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
        return client.read_logs(log_filter, limit=200)


def artifact(key: str, run_id: UUID) -> Artifact:
    found = Artifact.get(key)
    assert found is not None, key
    assert found.flow_run_id == run_id
    return found


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# --- taxi-tip-amounts -----------------------------------------------------------------------------


def test_tips_of_the_sample_equal_pandas_and_the_cluster_lives_in_one_task(storage_root: str) -> None:
    state, run_id = run(taxi_tip_amounts, source=str(SAMPLE), blocksize="256 KiB")

    sample = pd.read_csv(SAMPLE)
    expected = sample[sample.passenger_count > 0].groupby("passenger_count").tip_amount.mean().round(2)
    summary = state.result()
    assert {row["passengers"]: row["tip"] for row in summary["tips"]} == expected.to_dict()
    assert (summary["rides"], summary["left_out"]) == (len(sample), int((sample.passenger_count == 0).sum()))

    url = f"{storage_root}/taxi/{run_id}/tip_amounts.parquet"
    assert outputs(storage_root) == [url]
    assert storage.get_frame(url)["tip"].tolist() == expected.tolist()
    assert json.loads(str(artifact("taxi-tip-amounts-table", run_id).data)) == summary["tips"]
    assert "data:image/png;base64," in str(artifact("taxi-tip-amounts-chart", run_id).data)
    assert url in str(artifact("taxi-tip-amounts-outputs", run_id).data)

    runs = {task.name.rsplit("-", 1)[0]: task for task in until(lambda: task_runs(run_id), lambda r: len(r) == 3)}
    lines = until(
        lambda: [line for line in logs(run_id) if line.message.startswith("Dask cluster")],
        lambda found: any(line.message.endswith(": closed") for line in found),
    )
    assert {line.task_run_id for line in lines} == {runs["mean_tips"].id}
    closed = max(line.timestamp for line in lines)
    assert runs["presentable_tips"].start_time is not None
    assert closed < runs["presentable_tips"].start_time


@pytest.mark.usefixtures("threads")
def test_tips_of_several_parquet_files_with_missing_passenger_counts(storage_root: str, tmp_path: Path) -> None:
    for month, counts in {"1": [1.0, None, 2.0], "2": [2.0, 0.0, 1.0]}.items():
        table = pd.DataFrame({"passenger_count": counts, "tip_amount": [1.0, 2.0, 4.0], "airport_fee": None})
        table.to_parquet(tmp_path / f"yellow_{month}.parquet")

    state, run_id = run(taxi_tip_amounts, source=f"{tmp_path}/yellow_*.parquet")

    assert state.result()["tips"] == [
        {"passengers": 1, "tip": 2.5, "rides": 2},
        {"passengers": 2, "tip": 2.5, "rides": 2},
    ]
    assert state.result()["left_out"] == 2
    assert outputs(storage_root) == [f"{storage_root}/taxi/{run_id}/tip_amounts.parquet"]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("value", ["free", "inf"])
def test_a_wrong_value_fails_the_run_with_its_place_and_leaves_nothing(
    storage_root: str, tmp_path: Path, value: str
) -> None:
    write(tmp_path, "a.csv", "passengers,tip\n1,2\n")
    write(tmp_path, "b.csv", f"passengers,tip\n1,2\n,\n2,{value}\n")

    state, run_id = run(taxi_tip_amounts, source=f"{tmp_path}/*.csv")

    assert state.is_failed()
    with pytest.raises(InputError) as caught:
        state.result()
    assert str(caught.value) == f"file://{tmp_path}/b.csv: line 4, tip: '{value}' is not a number"
    assert outputs(storage_root) == []
    (mean_tips,) = until(lambda: task_runs(run_id), lambda r: len(r) == 1 and r[0].state is not None)
    assert mean_tips.run_count == 1


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"blocksize": "1 KiB"}, "blocksize"),
        ({"blocksize": "large"}, "blocksize"),
        ({"n_workers": 0}, "n_workers"),
    ],
)
def test_a_parameter_out_of_bounds_is_refused(storage_root: str, parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParameterTypeError, match=sentence):
        taxi_tip_amounts.validate_parameters({"source": str(SAMPLE), **parameters})
    assert outputs(storage_root) == []


# --- files ----------------------------------------------------------------------------------------


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    for name, text in {
        "empty.csv": "",
        "columns.csv": "a,b\n1,2\n",
        "notes.txt": "x",
        "fake.parquet": "no Parquet",
        "broken.csv": 'passengers,tip\n1,"2\n',
    }.items():
        write(tmp_path, name, text)
    place = f"file://{tmp_path}"

    def sentence(act: Callable[[], object]) -> str:
        with pytest.raises(InputError) as caught:
            act()
        return str(caught.value)

    assert sentence(lambda: files.matching(f"{tmp_path}/*.gone")) == f"{tmp_path}/*.gone: no file matches"
    assert "notes.txt: neither CSV (.csv, .csv.gz) nor Parquet (.parquet)" in sentence(
        lambda: files.matching(f"{tmp_path}/notes.txt")
    )
    write(tmp_path, "mixed.csv", "")
    write(tmp_path, "mixed.parquet", "")
    assert "matches both CSV and Parquet files" in sentence(lambda: files.matching(f"{tmp_path}/mixed.*"))
    assert sentence(lambda: files.all_rows([f"{place}/empty.csv"], WANTED, 2**20)) == (
        f"{place}/empty.csv: empty; expected a header line"
    )
    assert "no column for the passengers (passenger_count or passengers); found: a, b" in sentence(
        lambda: files.all_rows([f"{place}/columns.csv"], WANTED, 2**20)
    )
    assert "fake.parquet: not readable as Parquet" in sentence(
        lambda: files.first_rows(f"{place}/fake.parquet", WANTED, 5)
    )
    assert "broken.csv: not readable as CSV" in sentence(lambda: files.first_rows(f"{place}/broken.csv", WANTED, 5))
    with pytest.raises(StorageError, match=r"gone\.csv does not exist"):
        files.all_rows([f"{place}/gone.csv"], WANTED, 2**20)


def test_files_of_another_encoding_or_compression_are_refused_and_not_tried_again(tmp_path: Path) -> None:
    rows = b"passengers,tip\n" + b"1,2\n" * 1000
    files_and_sentences = {
        "latin.csv": (b"passengers,tip\n1,2\n1,2\xe9\n", "line 3: byte 4 of it is not UTF-8"),
        "latin.csv.gz": (gzip.compress(b"passengers,tip\n1,\xe9\n"), "line 2: byte 3 of it is not UTF-8"),
        "plain.csv.gz": (rows, "not readable as CSV in gzip: Not a gzipped file (b'pa')"),
        "short.csv.gz": (
            gzip.compress(rows)[:-12],
            "not readable as CSV in gzip: Compressed file ended before the end-of-stream marker was reached",
        ),
    }
    for name, (data, sentence) in files_and_sentences.items():
        (tmp_path / name).write_bytes(data)
        url = f"file://{tmp_path}/{name}"
        with pytest.raises(InputError) as caught:
            files.check_values([url], WANTED)
        assert str(caught.value).startswith(f"{url}: {sentence}")
        assert not storage.is_transient(caught.value)


def test_files_whose_columns_are_named_differently_are_not_mixed(tmp_path: Path) -> None:
    yellow = f"file://{write(tmp_path, 'yellow.csv', 'passenger_count,tip_amount')}"
    sample = f"file://{write(tmp_path, 'sample.csv', 'passengers,tip')}"
    with pytest.raises(
        InputError, match=r"sample\.csv: columns passengers, tip, but .*yellow\.csv has passenger_count"
    ):
        files.all_rows([yellow, sample], WANTED, 2**20)


def test_the_first_rows_of_csv_and_parquet_are_the_same(tmp_path: Path) -> None:
    sample = pd.read_csv(SAMPLE, parse_dates=["tpep_pickup_datetime"])
    sample.to_parquet(tmp_path / "sample.parquet", row_group_size=100)
    sample.to_csv(tmp_path / "sample.csv.gz", index=False)
    expected = files.first_rows(f"file://{SAMPLE}", transform.RIDE, 250)
    assert len(expected) == 250
    for name in ("sample.parquet", "sample.csv.gz"):
        found = files.first_rows(f"file://{tmp_path}/{name}", transform.RIDE, 250)
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_a_compressed_file_is_one_partition(tmp_path: Path) -> None:
    pd.read_csv(SAMPLE).to_csv(tmp_path / "sample.csv.gz", index=False)
    table = files.all_rows([f"file://{tmp_path}/sample.csv.gz"], WANTED, 2**16)
    assert table.npartitions == 1
    assert len(table.compute(scheduler="synchronous")) == 6500


# --- most-generous-riders -------------------------------------------------------------------------


def expected_top(nrows: int) -> list[tuple[str, float, float]]:
    """The best ride of each hour, ranked, by other means than the flow's."""
    rides = pd.read_csv(SAMPLE, nrows=nrows)
    rides = rides[(rides.tip_amount > 0) & (rides.total_amount > 0)]
    rides["ratio"] = (rides.tip_amount / rides.total_amount).round(9)
    rides["hour"] = rides.tpep_pickup_datetime.str[:13]
    ranked = rides.sort_values(["ratio", "tip_amount", "tpep_pickup_datetime"], ascending=[False, False, True])
    best = ranked.drop_duplicates("hour").head(10)
    return [
        (pickup.replace(" ", "T"), tip, total)
        for pickup, tip, total in zip(best.tpep_pickup_datetime, best.tip_amount, best.total_amount, strict=True)
    ]


def top(state: State[Any]) -> list[tuple[str, float, float]]:
    return [(ride["pickup"], ride["tip"], ride["total"]) for ride in state.result()["top"]]


def test_riders_with_injected_failures(storage_root: str, receiver: Receiver, targets: Callable[..., None]) -> None:
    targets(receiver.target)

    state, run_id = run(most_generous_riders, source=str(SAMPLE), nrows=40, failure_rate=0.2)

    assert state.is_completed()
    assert top(state) == expected_top(40)
    hours = state.result()["hours"]
    done = until(
        lambda: [task for task in task_runs(run_id) if task.name.startswith("clean-")],
        lambda found: len(found) == hours and all(task.state and task.state.is_completed() for task in found),
    )
    assert any(task.run_count > 1 for task in done), "no retry is visible"
    url = f"{storage_root}/taxi/{run_id}/top_riders.parquet"
    written = outputs(storage_root)
    assert len(written) == 2 * hours + 1
    assert url in written
    assert len(storage.get_frame(url)) == 10
    assert url in str(artifact("most-generous-riders-outputs", run_id).data)
    assert json.loads(str(artifact("most-generous-riders-table", run_id).data)) == state.result()["top"]
    assert "Most generous rider: " in str(artifact("most-generous-riders-report", run_id).data)
    (message,) = receiver.got
    assert message["type"] == "success"
    assert message["title"].startswith("Most generous rider: ")
    assert "10. " in message["message"]
    assert str(run_id) in message["message"]


@pytest.mark.usefixtures("threads")
def test_riders_without_failures_are_the_same_and_a_failing_webhook_fails_no_run(
    storage_root: str, receiver: Receiver, targets: Callable[..., None]
) -> None:
    receiver.answer = 500
    targets(receiver.target)

    state, run_id = run(most_generous_riders, source=str(SAMPLE), nrows=40)

    assert state.is_completed()
    assert top(state) == expected_top(40)
    assert len(receiver.got) == 1
    assert storage.exists(f"{storage_root}/taxi/{run_id}/top_riders.parquet")
    problem = "could not notify target 1 of 1 in TIDEPOOL_NOTIFY_URLS (JSON did not accept it)"
    until(lambda: [line.message for line in logs(run_id)], lambda found: any(problem in line for line in found))


@pytest.mark.usefixtures("threads", "storage_root")
def test_a_failure_rate_of_one_fails_the_run_and_sends_the_reason(
    receiver: Receiver, targets: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean, "retry_delay_seconds", 0)
    targets(receiver.target)

    state, run_id = run(most_generous_riders, source=str(SAMPLE), nrows=2, failure_rate=1)

    assert state.is_failed()
    (message,) = receiver.got
    assert (message["title"], message["type"]) == ("most-generous-riders failed", "failure")
    assert "attempt 6 fails on purpose (failure_rate=1)" in message["message"]
    assert str(run_id) in message["message"]


@pytest.mark.usefixtures("threads")
def test_awkward_rides_of_a_green_file(storage_root: str, tmp_path: Path) -> None:
    text = (
        "lpep_pickup_datetime,passenger_count,tip_amount,total_amount\n"
        "2019-03-01 00:10:00,,1,10\n"  # no passenger count
        ",1,9,10\n"  # no pickup time
        "2019-03-01 01:10:00,1,0,10\n"  # an hour without a tip
        "\n"
        "2019-03-01 00:20:00,2,3,10\n"
    )
    state, _ = run(most_generous_riders, source=write(tmp_path, "green.csv", text))

    summary = state.result()
    assert [(ride["pickup"], ride["ratio"]) for ride in summary["top"]] == [("2019-03-01T00:20:00", 0.3)]
    assert {name: summary[name] for name in ("rides", "without_pickup", "hours", "hours_without_tip")} == {
        "rides": 4,
        "without_pickup": 1,
        "hours": 2,
        "hours_without_tip": 1,
    }
    assert outputs(storage_root)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"{HEADER}2019-03-01 00:10:00,1,1,10\n2019-03-01 00:10:00,1,x7,10\n", "line 3, tip: 'x7' is not a number"),
        ("pickup,tip,passengers\n", "no column for the total (total_amount or total); found: pickup, tip, passengers"),
        ("", "empty; expected a header line"),
        (HEADER, "no ride with a pickup time in its first 10,000 rows"),
        (
            f"{HEADER}2019-03-01 00:10:00,1,1,10\n2019-03-01 00:10:00-05:00,1,1,10\n",
            "line 3, pickup: '2019-03-01 00:10:00-05:00' is not a local date and time",
        ),
    ],
    ids=["value", "column", "empty", "no rides", "offset"],
)
def test_bad_input_fails_the_run_and_leaves_nothing(
    storage_root: str, tmp_path: Path, text: str, sentence: str
) -> None:
    state, _ = run(most_generous_riders, source=write(tmp_path, "x.csv", text))

    assert state.is_failed()
    with pytest.raises(InputError) as caught:
        state.result()
    assert sentence in str(caught.value)
    assert "x.csv: " in str(caught.value)
    assert outputs(storage_root) == []


@pytest.mark.usefixtures("threads")
def test_rides_without_any_tip_are_a_result(storage_root: str, tmp_path: Path) -> None:
    state, run_id = run(most_generous_riders, source=write(tmp_path, "x.csv", f"{HEADER}2019-03-01 00:10:00,1,0,10\n"))
    assert state.result()["top"] == []
    assert artifact("most-generous-riders-report", run_id).description == "No ride with a tip in 1 ride"
    assert storage.exists(f"{storage_root}/taxi/{run_id}/top_riders.parquet")


@pytest.mark.usefixtures("threads", "storage_root")
def test_one_file_at_a_time(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", HEADER)
    write(tmp_path, "b.csv", HEADER)
    state, _ = run(most_generous_riders, source=f"{tmp_path}/*.csv")
    with pytest.raises(InputError, match="matches 2 files; specify one file"):
        state.result()


@pytest.mark.parametrize("parameters", [{"nrows": 0}, {"failure_rate": 1.5}, {"nrows": "many"}])
def test_a_riders_parameter_out_of_bounds_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ParameterTypeError, match=next(iter(parameters))):
        most_generous_riders.validate_parameters({"source": str(SAMPLE), **parameters})

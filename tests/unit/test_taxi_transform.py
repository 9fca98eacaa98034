from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.taxi import transform
from tidepool.errors import InputError


def rides(*rows: tuple[str | None, float | None, float | None, int | None]) -> pd.DataFrame:
    return transform.typed(pd.DataFrame(list(rows), columns=list(transform.RIDE)), "rides.csv")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            ["VendorID", "tpep_pickup_datetime", "passenger_count", "tip_amount", "total_amount"],
            ["tpep_pickup_datetime", "tip_amount", "total_amount", "passenger_count"],
        ),
        (
            ["lpep_pickup_datetime", "passenger_count", "tip_amount", "total_amount", "trip_type"],
            ["lpep_pickup_datetime", "tip_amount", "total_amount", "passenger_count"],
        ),
        (["pickup", "dropoff", "passengers", "tip", "total"], ["pickup", "tip", "total", "passengers"]),
    ],
    ids=["yellow", "green", "sample"],
)
def test_columns_of_every_kind_of_file_are_recognised(found: list[str], expected: list[str]) -> None:
    assert list(transform.columns(found, transform.RIDE, "x.csv").values()) == expected


def test_a_missing_column_is_named_with_what_is_there() -> None:
    with pytest.raises(InputError) as caught:
        transform.columns(["pickup", "total"], ("tip",), "x.csv")
    assert str(caught.value) == "x.csv: no column for the tip (tip_amount or tip); found: pickup, total"


def test_text_becomes_typed_columns_and_missing_values_stay_missing() -> None:
    table = rides(("2019-03-23 20:21:09", "2.15", "12.95", "1"), (np.nan, "0", "9.3", np.nan))
    assert table.dtypes.astype(str).to_dict() == {
        "pickup": "datetime64[ns]",
        "tip": "float64",
        "total": "float64",
        "passengers": "Int64",
    }
    assert table["passengers"].isna().tolist() == [False, True]
    assert table["pickup"].isna().tolist() == [False, True]


LOCAL = "a local date and time (ISO 8601, no offset)"


@pytest.mark.parametrize(
    ("row", "column", "value", "meaning"),
    [
        (1, "tip", "x7", "a number"),
        (2, "pickup", "23rd of March", LOCAL),
        (1, "pickup", "2019-03-23T20:21:09Z", LOCAL),
        (1, "pickup", "2019-03-23 20:21:09-04:00", LOCAL),
        (1, "pickup", "2019-03-23 20:21:09.5+0100", LOCAL),
        (0, "passengers", "1.5", "a whole number"),
        (2, "passengers", "1e30", "a whole number"),
        (1, "total", "inf", "a number"),
        (1, "tip", "1,5", "a number"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(row: int, column: str, value: str, meaning: str) -> None:
    raw = pd.DataFrame([["2019-03-23 20:21:09", "2.15", "12.95", "1"]] * 3, columns=list(transform.RIDE))
    raw.loc[row, column] = value
    with pytest.raises(InputError) as caught:
        transform.typed(raw, "x.csv", first_line=2)
    assert str(caught.value) == f"x.csv: line {row + 2}, {column}: {value!r} is not {meaning}"
    with pytest.raises(InputError, match=f"x.parquet: row {row + 1}, {column}: "):
        transform.typed(raw, "x.parquet")


def test_mixed_offsets_are_refused_at_the_first() -> None:
    raw = pd.DataFrame({"pickup": ["2019-03-01 20:21", "2019-03-01 20:21-05:00", "2019-03-23 20:21-04:00"]})
    with pytest.raises(InputError, match=r"^x\.csv: line 3, pickup: '2019-03-01 20:21-05:00' is not a local date"):
        transform.typed(raw, "x.csv", first_line=2)


def test_local_times_of_every_precision_are_read() -> None:
    raw = pd.DataFrame({"pickup": ["2019-03-23", "2019-03-23 20:21", "2019-03-23T20:21:09.25", None]})
    assert transform.typed(raw, "x")["pickup"].dt.strftime("%d %H:%M:%S.%f").tolist()[:3] == [
        "23 00:00:00.000000",
        "23 20:21:00.000000",
        "23 20:21:09.250000",
    ]


@pytest.mark.parametrize("values", [pd.to_datetime(["2019-03-23 20:21"], utc=True), [1553372469]])
def test_times_of_parquet_with_a_zone_and_numbers_are_refused(values: object) -> None:
    with pytest.raises(InputError, match=r"^x\.parquet: row 1, pickup: .* is not a local date and time"):
        transform.typed(pd.DataFrame({"pickup": values}), "x.parquet")


def test_typed_leaves_its_input_alone() -> None:
    raw = pd.DataFrame({"tip": ["1", "2"]})
    transform.typed(raw, "x.csv")
    assert raw["tip"].tolist() == ["1", "2"]


def test_rides_are_split_by_date_and_hour() -> None:
    table = rides(
        ("2019-03-02 00:10:00", 1, 10, 1),
        ("2019-03-01 00:59:59", 2, 10, 1),
        ("2019-03-01 01:00:00", 3, 10, 1),
        ("2019-03-01 00:00:00", 4, 10, 1),
        (None, 5, 10, 1),
    )
    chunks = {hour: chunk["tip"].tolist() for hour, chunk in transform.by_hour(table)}
    assert list(chunks.items()) == [("2019-03-01T00", [2, 4]), ("2019-03-01T01", [3]), ("2019-03-02T00", [1])]


def test_only_rides_with_a_tip_and_a_positive_total_stay() -> None:
    at = "2019-03-01 00:00:00"
    table = rides((at, 1, 10, 1), (at, 0, 10, 1), (at, -1, 10, 1), (at, 1, 0, 1), (at, 1, -3, 1), (at, None, 10, 1))
    assert transform.paid_with_tip(table)[["tip", "total"]].to_dict("records") == [{"tip": 1, "total": 10}]


def test_the_most_generous_come_first_and_equal_ones_by_tip_then_time() -> None:
    table = rides(
        ("2019-03-01 05:00:00", 2.49, 10.79, 1),  # 3/13, as the next two: not equal as floating-point quotients
        ("2019-03-01 04:00:00", 3.84, 16.64, 2),
        ("2019-03-01 03:00:00", 2.49, 10.79, 3),
        ("2019-03-01 02:00:00", 5, 10, 4),
        ("2019-03-01 01:00:00", 1, 10, 5),
    )
    assert transform.most_generous(table, 4)["passengers"].tolist() == [4, 2, 3, 1]
    assert transform.most_generous(table, 1)["ratio"].tolist() == [0.5]


def test_without_rides_there_is_no_most_generous_one() -> None:
    assert transform.records(transform.most_generous(rides(), 3)) == []
    assert transform.from_records([]).empty


def test_records_are_json_and_make_the_same_rides_again() -> None:
    table = rides(("2019-03-01 05:00:00", 2.5, 10, 1), ("2019-03-01 04:00:00", 3, 16, None))
    found = transform.records(table)
    assert json.loads(json.dumps(found, allow_nan=False)) == [
        {"pickup": "2019-03-01T05:00:00", "tip": 2.5, "total": 10.0, "passengers": 1},
        {"pickup": "2019-03-01T04:00:00", "tip": 3.0, "total": 16.0, "passengers": None},
    ]
    pd.testing.assert_frame_equal(transform.from_records(found), table)


@given(chunk=st.text(), seed=st.integers(), rate=st.floats(0, 1, exclude_max=True))
def test_the_last_attempt_is_spared_unless_the_rate_is_one(chunk: str, seed: int, rate: float) -> None:
    assert not transform.fails_on_purpose(chunk, 6, last_attempt=6, rate=rate, seed=seed)
    assert transform.fails_on_purpose(chunk, 6, last_attempt=6, rate=1, seed=seed)
    assert not transform.fails_on_purpose(chunk, 1, last_attempt=6, rate=0, seed=seed)


def test_injected_failures_are_the_same_for_the_same_seed_and_come_at_the_rate() -> None:
    def failing(seed: int) -> list[bool]:
        return [
            transform.fails_on_purpose(f"chunk {number}", attempt, last_attempt=9, rate=0.2, seed=seed)
            for number in range(1000)
            for attempt in (1, 2)
        ]

    assert failing(1) == failing(1)
    assert failing(1) != failing(2)
    assert sum(failing(1)) == pytest.approx(400, abs=60)


def test_mean_tips_of_counts_above_zero_rounded_to_cents() -> None:
    means = pd.DataFrame(
        {"passengers": [2, None, 0, 1, 9], "tip": [2.135, 1.0, 3.0, 1.999, None], "rides": [3, 1, 2, 4, 1]}
    )
    assert transform.tips_by_passengers(means).to_dict("list") == {
        "passengers": [1, 2],
        "tip": [2.0, 2.13],
        "rides": [4, 3],
    }


def test_a_file_without_rows_has_no_mean() -> None:
    with pytest.raises(InputError, match=r"^no rides; no mean can be computed$"):
        transform.tips_by_passengers(pd.DataFrame([]))


def test_no_passenger_count_above_zero_is_an_error() -> None:
    with pytest.raises(InputError, match="no ride has both a passenger count above 0 and a tip"):
        transform.tips_by_passengers(pd.DataFrame({"passengers": [0], "tip": [1.0], "rides": [1]}))

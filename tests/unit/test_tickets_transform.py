from __future__ import annotations

import io
import math
import zipfile
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.tickets import transform
from flows.tickets.transform import HOUR, Trial
from tidepool.errors import InputError

HEADER = "number,opened_at,sys_updated_at,priority,closed_at\n"
LOG = (
    HEADER
    + "INC1,29-02-2016 01:16,29-02-2016 01:23,3 - Moderate,05-03-2016 12:00\n"
    + "INC2,1/3/2016 0:05,03/05/2016 06:00,4 - Low,02/05/2016 06:00\n"
    + "INC3,?,03-05-2016 06:00,?,?\n"
)
SUMMARY: dict[str, Any] = {
    "id": "t1",
    "data": {
        "num_obs": 2,
        "num_dropped": 1,
        "metrics": {"MAE": 5400.0, "MedAE": 3600.0, "MSE": 3600.0**2, "R2": 0.5},
        "target": {"mean": 3600.0, "median": 3600.0, "min": -3600.0, "max": 7200.0},
    },
}


def zipped(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            # With a constant date: the bytes are parts of test ids, which xdist's processes must agree on.
            archive.writestr(zipfile.ZipInfo(name.replace("__", "/") + ".csv"), text)
    return buffer.getvalue()


def tickets(closed_and_updated: list[tuple[str | None, str | None]]) -> pd.DataFrame:
    frame = pd.DataFrame(closed_and_updated, columns=["closed_at", "sys_updated_at"], dtype=object)
    return transform.parse_timestamps(frame)


def trial(name: str) -> Trial:
    return Trial("2026-11-21 10:00:00", name, "x.csv", 100, 0, 1.0, 2.0, 3.0, None)


@pytest.mark.parametrize(
    "data",
    [
        LOG.encode(),
        b"\xef\xbb\xbf" + LOG.encode(),
        LOG.replace("\n", "\r\n").encode(),
        zipped(incident_event_log=LOG),
        zipped(readme="x", incident__incident_event_log=LOG),
    ],
    ids=["plain", "byte order mark", "Windows", "ZIP", "ZIP with folders"],
)
def test_the_log_is_read_however_it_is_packed(data: bytes) -> None:
    frame = transform.read(data, "x.csv")
    assert list(frame.columns) == ["opened_at", "sys_updated_at", "priority", "closed_at"]
    assert frame["closed_at"].tolist()[:2] == ["05-03-2016 12:00", "02/05/2016 06:00"]
    assert frame.isna().sum().to_dict() == {"opened_at": 1, "sys_updated_at": 0, "priority": 1, "closed_at": 1}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "x.csv: the file is empty; expected a CSV with the columns sys_updated_at, closed_at, priority"),
        (HEADER.encode(), "x.csv: a header, but no tickets below it"),
        (b"number,priority\n1,2\n", "x.csv: columns 'sys_updated_at', 'closed_at' missing; found: number, priority"),
        (LOG.replace("closed_at", "shut").encode(), "x.csv: column 'closed_at' missing; found: number, opened_at, "),
        (
            (LOG + "a,b,c,d,e,f\n").encode(),
            "x.csv: not a CSV in UTF-8: CSV parse error: Row #5: Expected 5 columns, got 6",
        ),
        (LOG.encode("utf-16"), "x.csv: not a CSV in UTF-8: line 1: byte 1 of it is not UTF-8"),
        *(
            (
                (LOG + f"INC4,?,03-05-2016 06:00,?,{time}\n").encode(),
                f"x.csv: row 5, closed_at: '{time}' is not a local time (day-month-year hour:minute); the header is",
            )
            for time in ("2016-03-05T06:00:00+01:00", "05-03-2016 06:00 -0500", "2016-03-05 06:00", "NaN", "soon")
        ),
        (
            (LOG + "INC4,?,03-05-2016 06:00Z,?,?\n").encode(),
            "x.csv: row 5, sys_updated_at: '03-05-2016 06:00Z' is not a local time (day-month-year hour:minute)",
        ),
        (LOG.replace("opened_at", "closed_at").encode(), "x.csv: duplicate column 'closed_at'"),
        (LOG.encode() + b"INC4,?,?,\xe9,?\n", "x.csv: not a CSV in UTF-8: line 5: byte 10 of it is not UTF-8"),
        (zipped(other=LOG), "x.csv: the ZIP has no incident_event_log.csv; found: other.csv"),
        (zipped(incident_event_log=LOG)[:60], "x.csv: the ZIP cannot be read: File is not a zip file"),
    ],
)
def test_an_invalid_event_log_is_refused_in_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        transform.read(data, "x.csv")
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 2**128 - 1))
def test_a_sample_has_distinct_rows_and_is_repeatable(rows: int, size: int, seed: int) -> None:
    frame = pd.DataFrame({"row": range(rows)})
    drawn = transform.sample(frame, size, seed)["row"].tolist()
    assert len(set(drawn)) == len(drawn) == min(rows, size)
    assert transform.sample(frame, size, seed)["row"].tolist() == drawn
    if size >= rows:
        assert drawn == list(range(rows))


def test_timestamps_are_day_first_with_either_separator_in_one_column() -> None:
    frame = pd.DataFrame({"closed_at": ["03-05-2016 06:00", "03/05/2016 06:00", " 3-5/2016 6:00", "31/02/2016 06:00"]})
    before = frame.copy()
    parsed = transform.parse_timestamps(frame)["closed_at"]
    assert parsed.tolist()[:3] == [pd.Timestamp(2016, 5, 3, 6)] * 3
    assert parsed[3] is pd.NaT
    pd.testing.assert_frame_equal(frame, before)


def test_the_target_is_in_seconds_may_be_negative_and_is_unknown_when_a_time_is() -> None:
    seconds = transform.target(
        tickets(
            [
                ("05-03-2016 12:00", "29-02-2016 01:23"),
                ("02/05/2016 06:00", "03-05-2016 06:00"),
                (None, "03-05-2016 06:00"),
                ("03-05-2016 06:00", "yesterday"),
            ]
        )
    )
    assert seconds.tolist()[:2] == [5 * 86400 + 10 * HOUR + 37 * 60, -86400]
    assert seconds.isna().tolist() == [False, False, True, True]


def test_a_file_without_any_readable_time_has_only_unknown_targets() -> None:
    assert transform.target(tickets([(None, None)])).isna().all()


@pytest.mark.parametrize(
    ("priority", "hours"),
    [
        ("1 - Critical", 6),
        ("2 - High", 24),
        ("3 - Moderate", 120),
        ("4 - Low", 240),
        ("4 - Lower", 240),
        (" 4 - Low ", 240),
        ("5 - Whatever", 180),
        (None, 180),
    ],
)
def test_the_prediction_goes_by_priority(priority: str | None, hours: float) -> None:
    assert transform.predict(pd.Series([priority], dtype=object)).tolist() == [hours * HOUR]


def test_metrics_leave_unknown_targets_out() -> None:
    known = transform.pairs(pd.Series([1.0, math.nan, 3.0, 8.0]), pd.Series([2.0, 100.0, 3.0, 4.0]))
    # errors 1, 0, -4; mean of the targets 4: total squares 9 + 1 + 16 = 26
    measured = transform.metrics(known)
    assert measured == pytest.approx({"MAE": 5 / 3, "MedAE": 1.0, "MSE": 17 / 3, "R2": 1 - 17 / 26})


def test_r2_of_one_row_is_null() -> None:
    known = transform.pairs(pd.Series([1.0]), pd.Series([3.0]))
    assert transform.metrics(known) == {"MAE": 2.0, "MedAE": 2.0, "MSE": 4.0, "R2": None}
    resampled = transform.resample(known, 1, 0, 3)
    assert transform.intervals([resampled]) == {"MAE": [2, 2], "MedAE": [2, 2], "MSE": [4, 4], "R2": None}


@given(st.integers(1, 200), st.integers(1, 20))
def test_shares_cover_each_number_once(count: int, parts: int) -> None:
    found = transform.shares(count, parts)
    assert len(found) == min(count, parts)
    assert [number for first, length in found for number in range(first, first + length)] == list(range(count))


def test_a_bootstrap_has_the_same_numbers_in_one_share_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    actual = pd.Series(generator.normal(size=30))
    known = transform.pairs(actual, actual + generator.normal(size=30))
    whole = transform.resample(known, 5, 0, 40)
    monkeypatch.setattr(transform, "_CELLS_AT_ONCE", 100)  # three resamples at once
    parts = [transform.resample(known, 5, first, count) for first, count in transform.shares(40, 7)]
    assert {name: [value for part in parts for value in part[name]] for name in whole} == whole
    assert transform.intervals(parts) == transform.intervals([whole])
    assert len(set(whole["MSE"])) == 40
    assert transform.resample(known, 6, 0, 40) != whole


def test_the_interval_of_the_mean_error_is_close_to_the_normal_one() -> None:
    generator = np.random.default_rng(2)
    actual = pd.Series(generator.normal(size=400))
    known = transform.pairs(actual, pd.Series(np.zeros(400)))
    errors = actual.abs()
    spread = 1.96 * errors.std() / 20
    interval = transform.intervals([transform.resample(known, 3, 0, 2000)])["MAE"]
    assert interval == pytest.approx([errors.mean() - spread, errors.mean() + spread], abs=0.01)


def test_the_summary() -> None:
    actual = pd.Series([1.0, math.nan, 3.0, 8.0])
    measured: dict[str, float | None] = {"MAE": 1.0, "MedAE": 1.0, "MSE": 1.0, "R2": None}
    summary = transform.summarise("t1", actual, measured, None)
    assert summary == {
        "id": "t1",
        "data": {
            "num_obs": 3,
            "num_dropped": 1,
            "metrics": measured,
            "target": {"mean": 4.0, "median": 3.0, "min": 1.0, "max": 8.0},
        },
    }
    with_intervals = transform.summarise("t1", actual, measured, {"MAE": [0.5, 1.5], "R2": None})
    assert with_intervals["data"].pop("intervals") == {"MAE": [0.5, 1.5], "R2": None}
    assert with_intervals == summary


def test_a_line_of_the_history_is_in_hours() -> None:
    assert transform.line(SUMMARY, "2026-11-21 10:00:00", "x.csv") == Trial(
        "2026-11-21 10:00:00", "t1", "x.csv", 2, 1, 1.5, 1.0, 1.0, 0.5
    )


def test_the_history_is_bounded_newest_first_and_has_each_trial_once() -> None:
    history = [trial("c"), trial("b"), trial("a")]
    assert transform.extend(history, trial("d"), 3) == [trial("d"), trial("c"), trial("b")]
    assert transform.extend(history, trial("b"), 3) == [trial("b"), trial("c"), trial("a")]
    assert transform.extend([], trial("a"), 3) == [trial("a")]


def test_the_history_is_read_from_its_own_table() -> None:
    history = [trial("b"), trial("a")]
    assert transform.read_history(pd.DataFrame(transform.rows(history)).to_json(orient="records")) == history
    assert list(transform.rows(history)[0])[-2:] == ["source", "trial"]


@pytest.mark.parametrize("text", ["", "[1]", '[{"time": "x"}]', "# a page"])
def test_an_invalid_history_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Trial|JSON"):
        transform.read_history(text)


def test_the_page_shows_the_result_in_hours() -> None:
    text = transform.markdown(SUMMARY, "x.csv", "file:///t1.json", "PICTURE")
    assert text.splitlines()[:7] == [
        "**MAE 1.5 h · MedAE 1.0 h · R2 0.500 · 2 tickets, 1 left out**",
        "",
        "| metric | value |",
        "|---|---:|",
        "| MAE | 1.500 h |",
        "| MedAE | 1.000 h |",
        "| MSE | 1.000 h² |",
    ]
    assert "took: mean 1.0 h, median 1.0 h, min -1.0 h, max 2.0 h" in text
    assert "PICTURE" in text


def test_the_page_shows_intervals_and_what_is_not_known() -> None:
    data = SUMMARY["data"] | {
        "num_obs": 1,
        "num_dropped": 0,
        "metrics": SUMMARY["data"]["metrics"] | {"R2": None},
        "intervals": {"MAE": [3600.0, 7200.0], "MedAE": [3600.0, 3600.0], "MSE": [0.0, 3600.0**2], "R2": None},
    }
    lines = transform.markdown({"id": "t1", "data": data}, "x.csv", "file:///t1.json", "PICTURE").splitlines()
    assert lines[0] == "**MAE 1.5 h · MedAE 1.0 h · 1 ticket**"
    assert lines[2:8] == [
        "| metric | value | 95% interval |",
        "|---|---:|---:|",
        "| MAE | 1.500 h | 1.000 to 2.000 h |",
        "| MedAE | 1.000 h | 1.000 to 1.000 h |",
        "| MSE | 1.000 h² | 0.000 to 1.000 h² |",
        "| R2 | - | - |",
    ]

from __future__ import annotations

import datetime as dt
import json
import warnings

import numpy as np
import pandas as pd
import pytest

from flows.forecast import models, transform
from flows.forecast.transform import Backtest, Forecast, Outcome, Plan, Score
from tidepool.errors import InputError

PLAN = Plan(horizon=2, windows=2)
MONDAY = dt.date(2026, 3, 2)


def series(*values: float) -> pd.Series:
    index = pd.date_range("2026-01-04", periods=len(values), freq="W-SUN")
    return pd.Series(values, index=index, dtype=float)


def yearly(weeks: int) -> np.ndarray:
    week = np.arange(weeks)
    noise = np.random.default_rng(0).normal(scale=0.1, size=weeks)
    return 100 + 0.1 * week + 5 * np.sin(2 * np.pi * week / models.YEAR) + noise


def score(model: str, mase: float | None, failures: tuple[str, ...] = ()) -> Score:
    return Score(model, mase, mase, mase, mase, 2 - len(failures), (), failures)


# --- from a CSV to weeks ----------------------------------------------------------------------------


def test_daily_values_become_means_of_weeks_that_end_on_sunday() -> None:
    text = "day,level\n" + "".join(f"2026-01-{day:02},{day}\n" for day in range(5, 19))  # Monday 5 to Sunday 18
    found = transform.weekly(transform.observations(text, "day", "level"), MONDAY)
    assert found.to_dict() == {pd.Timestamp("2026-01-11"): 8.0, pd.Timestamp("2026-01-18"): 15.0}


def test_a_time_on_sunday_belongs_to_the_week_that_ends_that_day() -> None:
    text = "date,v\n2026-01-11T23:59:00,1\n2026-01-12T00:00:00,5\n"
    found = transform.weekly(transform.observations(text, "date", "v"), MONDAY)
    assert found.to_list() == [1.0, 5.0]


def test_dates_with_an_offset_count_by_their_day_in_utc() -> None:
    found = transform.observations("date,v\n2026-01-11T23:30:00-01:00,1\n", "date", "v")
    assert found.index.to_list() == [pd.Timestamp("2026-01-12")]


def test_irregular_unsorted_days_leave_gaps_and_missing_values_count_for_nothing() -> None:
    text = "date,v\n2026-01-21,4\n\n2026-01-05,1\n2026-01-06,\n2026-01-07, NA \n2026-01-07,3\n"
    found = transform.weekly(transform.observations(text, "date", "v"), MONDAY)
    assert found.index.strftime("%m-%d").to_list() == ["01-11", "01-18", "01-25"]
    np.testing.assert_equal(found.to_numpy(), [2.0, np.nan, 4.0])


@pytest.mark.parametrize(
    ("before", "weeks"),
    [(dt.date(2026, 1, 18), 1), (dt.date(2026, 1, 19), 2)],
    ids=["on its Sunday a week is not over", "on Monday it is"],
)
def test_an_unfinished_week_is_left_out(before: dt.date, weeks: int) -> None:
    observed = transform.observations("date,v\n2026-01-11,1\n2026-01-12,2\n", "date", "v")
    assert len(transform.weekly(observed, before)) == weeks


def test_no_finished_week() -> None:
    observed = transform.observations("date,v\n2026-02-28,1\n", "date", "v")
    with pytest.raises(InputError, match="no observation in a week that ended before 2026-02-25"):
        transform.weekly(observed, dt.date(2026, 2, 25))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("day,v\n2026-01-11,1\n", "column 'date' is missing; found: day, v"),
        ("date,w\n2026-01-11,1\n", "column 'v' is missing; found: date, w"),
        ("date,v\n\n31/01/2026,1\n", "line 3, column 'date': '31/01/2026' is not an ISO 8601 date such as 2026-01-31"),
        ("date,v\n,1\n", "line 2, column 'date': '' is not an ISO 8601 date such as 2026-01-31"),
        ("date,v\n2026-01-11,1\n2026-01-12,x7\n", "line 3, column 'v': 'x7' is not a finite number"),
        ("date,v\n2026-01-11,inf\n", "line 2, column 'v': 'inf' is not a finite number"),
        ("date,v\n2026-01-11,1,2\n", "line 2: 3 columns; the header has 2"),
        ('date,v\n2026-01-11,"1\n', "line 2: unexpected end of data"),
        ("date,v,v\n2026-01-11,1,2\n", "duplicate column 'v'"),
        (
            "date,v\n2026-01-11,\n2026-01-11,1\n2026-01-12,2\n2026-01-11T01:00:00+01:00,1\n",
            "line 5, column 'date': '2026-01-11T01:00:00+01:00' is a duplicate of line 3",
        ),
    ],
)
def test_a_bad_csv_is_refused_with_its_place(text: str, sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        transform.observations(text, "date", "v")
    assert str(refused.value) == sentence


def test_a_header_alone_has_no_observations() -> None:
    assert transform.observations("date,v\n", "date", "v").empty


# --- what is held out -------------------------------------------------------------------------------


def test_windows_are_the_last_weeks_oldest_first() -> None:
    assert [PLAN.weeks_of(window, 10) for window in (1, 2)] == [slice(6, 8), slice(8, 10)]


def test_a_plan_must_hold_out_enough_for_the_interval() -> None:
    transform.check_plan(Plan(horizon=1, windows=transform.MINIMUM_ERRORS))
    with pytest.raises(InputError, match="horizon 3 and windows 1 hold out 3 weeks; horizon times windows must be at"):
        transform.check_plan(Plan(horizon=3, windows=1))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((1, 2, 3, 4, 5, 6), "6 weeks, but 2 windows of 2 weeks need at least 7 in all"),
        ((1, 2, 3, np.nan, np.nan, 6, 7), "no observation in window 1, the weeks that end 2026-01-25 to 2026-02-01"),
        ((1, 2, 3, 4, np.nan, 6, 7), "3 observed weeks in the windows; the interval needs at least 4"),
        ((5, 5, 5, 6, 7, 8, 9), "the first 3 weeks are all 5; models cannot be compared on values that never change"),
    ],
)
def test_a_series_that_models_cannot_be_compared_on(values: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        transform.check_series(series(*values), PLAN)
    assert str(refused.value).startswith(sentence)


def test_a_gap_before_the_window_is_not_filled_from_inside_it() -> None:
    full = series(1, 2, np.nan, 4, np.nan, 100, 101, 102, 103)
    assert transform.filled(full.to_numpy()[:5]).tolist() == [1, 2, 3, 4, 4]
    assert transform.backtest("last-value", 1, full, PLAN).forecast.points == (4, 4)


def test_a_backtest_never_sees_its_window() -> None:
    seen = series(*yearly(130))
    changed = seen.copy()
    changed.iloc[PLAN.start(1, len(seen)) :] = 1e6
    for model in models.MODEL_NAMES:
        assert transform.backtest(model, 1, seen, PLAN) == transform.backtest(model, 1, changed, PLAN), model


# --- models -----------------------------------------------------------------------------------------


def test_the_plain_models_by_hand() -> None:
    history = np.array([1.0, 3.0, 2.0, 7.0])
    assert models.predict("last-value", history, 3).tolist() == [7, 7, 7]
    assert models.predict("drift", history, 2).tolist() == [9, 11]
    year = np.arange(60.0)
    assert models.predict("seasonal-naive", year, 3).tolist() == [8, 9, 10]
    assert models.predict("seasonal-naive", year, 54)[52:].tolist() == [8, 9]


@pytest.mark.parametrize("model", ["theta", "holt-winters", "lag-regression", "arima"])
@pytest.mark.parametrize("weeks", [60, 260], ids=["one year: no season known", "five years"])
def test_the_fitted_models_follow_trend_and_season(model: models.ModelName, weeks: int) -> None:
    values = yearly(weeks + 8)
    said = transform.forecast(model, values[:weeks], 8)
    assert said.failure == ""
    error = np.abs(np.array(said.points) - values[weeks:]).mean()
    flat = np.abs(values[weeks - 1] - values[weeks:]).mean()
    assert error < (flat / 2 if weeks > 104 else flat)


@pytest.mark.parametrize("model", models.MODEL_NAMES)
def test_a_model_is_deterministic(model: models.ModelName) -> None:
    assert transform.forecast(model, yearly(150), 3) == transform.forecast(model, yearly(150), 3)


def test_a_model_that_cannot_is_a_failure_with_its_reason() -> None:
    said = transform.forecast("seasonal-naive", np.arange(20.0), 2)
    assert said == Forecast((), (), "ValueError: needs 52 weeks of history, has 20")


def test_a_forecast_that_is_not_a_number_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform, "predict", lambda *_: np.array([1.0, np.nan]))
    assert transform.forecast("theta", np.arange(9.0), 2).failure == "a forecast is not a finite number"


def test_warnings_of_a_model_are_counted_and_do_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    def shaky(*_: object) -> np.ndarray:
        for _time in range(2):
            warnings.warn("not converged", RuntimeWarning, stacklevel=1)
        # As the garbage collector does, of what another thread left.
        warnings.warn("unclosed transport", ResourceWarning, stacklevel=1)
        return np.array([1.0])

    monkeypatch.setattr(transform, "predict", shaky)
    said = transform.forecast("theta", np.arange(9.0), 1)
    assert said.warnings == ("2 x RuntimeWarning: not converged",)
    assert said.points == (1.0,)


# --- scores, the winner, next week ------------------------------------------------------------------


def test_scores_by_hand() -> None:
    # Histories 10, 12, 11, 13 (mean change 5/3) and 10, 12, 11, 13, 15, 15 (mean change 7/5).
    weeks = series(10, 12, 11, 13, 15, 15, 10, np.nan)
    backtests = [
        Backtest("drift", 1, Forecast((14.0, 17.0))),  # off by 1 and 2
        Backtest("drift", 2, Forecast((13.0, 99.0))),  # off by 3; the other week was not observed
    ]
    (found,) = transform.scores(backtests, weeks, PLAN)
    assert found.mase == pytest.approx((1.5 / (5 / 3) + 3 / (7 / 5)) / 2)
    assert found.rmse == pytest.approx(((1 + 4 + 9) / 3) ** 0.5)
    assert found.mae == pytest.approx(2)
    assert found.smape == pytest.approx((200 * 1 / 29 + 200 * 2 / 32 + 200 * 3 / 23) / 3)


def test_smape_of_zero_beside_zero_is_zero() -> None:
    weeks = series(1, 2, 3, 0, 0, 0, 0)
    backtests = [Backtest("drift", window, Forecast((0.0, 0.0))) for window in (1, 2)]
    assert transform.scores(backtests, weeks, PLAN)[0].smape == 0


def test_ties_go_to_the_simpler_model_and_failures_last() -> None:
    weeks = series(1, 2, 3, 4, 5, 6, 7)
    backtests = [
        Backtest("arima", 1, Forecast((4.0, 5.0))),
        Backtest("arima", 2, Forecast((6.0, 7.0))),
        Backtest("last-value", 1, Forecast((), ("1 x W: w",), "ValueError: no")),
        Backtest("last-value", 2, Forecast((6.0, 7.0), ("1 x W: w",))),
        Backtest("drift", 1, Forecast((4.0, 5.0))),
        Backtest("drift", 2, Forecast((6.0, 7.0))),
    ]
    ranked = transform.scores(backtests, weeks, PLAN)
    assert [score.model for score in ranked] == ["drift", "arima", "last-value"]
    assert transform.winner(ranked).model == "drift"
    failed = ranked[-1]
    assert (failed.mase, failed.windows) == (None, 1)
    assert failed.failures == ("window 1: ValueError: no",)
    assert failed.warnings == ("1 x W: w",)


def test_no_model_with_every_window_names_the_reasons() -> None:
    failed = [score("theta", None, ("window 1: ValueError: x",)), score("arima", None, ("window 2: ValueError: y",))]
    with pytest.raises(InputError) as refused:
        transform.winner(failed)
    assert str(refused.value) == (
        "no model forecast every window: theta on window 1: ValueError: x; arima on window 2: ValueError: y"
    )


@pytest.mark.parametrize(("errors", "half"), [((-1, 2, -3, 4), 4), (tuple(range(1, 10)), 8), (tuple(range(33)), 27)])
def test_the_interval_is_the_conformal_quantile_of_the_absolute_errors(errors: tuple[float, ...], half: float) -> None:
    assert transform.interval(errors) == half


def test_one_step_errors_know_everything_before_their_week_and_skip_gaps() -> None:
    weeks = series(1, 2, 3, 4, 6, np.nan, 9)
    assert transform.one_step_errors("last-value", 1, weeks, PLAN) == [1, 2]
    assert transform.one_step_errors("last-value", 2, weeks, PLAN) == [3]


def test_one_step_errors_skip_what_the_model_cannot() -> None:
    assert transform.one_step_errors("seasonal-naive", 1, series(1, 2, 3, 4, 5, 6, 7), PLAN) == []


def test_next_week() -> None:
    found = transform.next_week("drift", series(1, 2, 3, 4, 5, 6, 7), [0.5, -1, 0.25, 2])
    assert (found.week, found.errors) == (dt.date(2026, 2, 22), 4)
    assert (found.low, found.value, found.high) == (6, 8, 10)


def test_next_week_of_too_few_errors() -> None:
    with pytest.raises(InputError, match="drift forecast 1 held-out weeks one week ahead; the interval needs 4"):
        transform.next_week("drift", series(1, 2, 3), [1])


def test_next_week_of_a_model_that_fails_at_the_end() -> None:
    with pytest.raises(InputError, match="seasonal-naive, the best model, failed on the whole series: ValueError"):
        transform.next_week("seasonal-naive", series(1, 2, 3), [1, 2, 3, 4])


def test_the_summary_is_json_and_the_table_has_what_was_forecast() -> None:
    weeks = series(1, 2, 3, 4, 5, 6, np.nan)
    backtests = [
        Backtest("drift", 1, Forecast((4.0, 5.0))),
        Backtest("theta", 1, Forecast((), (), "ValueError: x")),
        Backtest("drift", 2, Forecast((6.0, 7.0))),
    ]
    ranked = [score("drift", 1.0), score("theta", None, ("window 1: ValueError: x",))]
    prediction = transform.next_week("drift", weeks, [1, 1, 1, 1])
    outcome = Outcome("x.csv", PLAN, backtests, ranked, prediction)
    summary = transform.summary(outcome, weeks)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["winner"] == "drift"
    assert summary["prediction"]["week"] == "2026-02-22"
    assert summary["series"] == {
        "source": "x.csv",
        "weeks": 7,
        "filled": 1,
        "first": "2026-01-04",
        "last": "2026-02-15",
    }
    table = transform.backtest_table(outcome, weeks)
    assert table["model"].to_list() == ["drift"] * 4
    assert table["forecast"].to_list() == [4, 5, 6, 7]
    np.testing.assert_equal(table["actual"].to_numpy(), [4, 5, 6, np.nan])


@pytest.mark.parametrize(("last", "most", "weeks"), [(22, 2, 0), (8, 2, 0), (1, 2, 3), (1, 3, 0), (1, 0, 3)])
def test_a_series_is_stale_if_its_last_week_is_too_many_weeks_old(last: int, most: int, weeks: int) -> None:
    """On Wednesday 25 March 2026, the latest week has ended on Sunday the 22nd."""
    text = transform.stale(dt.date(2026, 3, last), dt.date(2026, 3, 25), most)
    assert (f", {weeks} weeks before the last full week" in text) if weeks else not text

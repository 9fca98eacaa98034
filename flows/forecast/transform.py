"""From observations to weeks, backtests, scores and the prediction of next week. Pure functions.

A weekly series is a `pandas.Series` of floats indexed by the Sundays that the weeks end on; NaN is a week without an
observation. Such a week is filled where a model needs a history without gaps, from what lies before the forecast only,
and is never scored.
"""

from __future__ import annotations

import csv
import io
import math
import threading
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flows.forecast.models import MODEL_NAMES, ModelName, predict
from tidepool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import date

    from flows.forecast.models import FloatArray

COVERAGE = 80  # percent
MINIMUM_ERRORS = 4  # the fewest for such an interval: with three, `interval` would need a fourth
MINIMUM_HISTORY = 3  # weeks
FRESH_WEEKS = 2  # older data has missed a delivery
_LARGEST = float(np.finfo(np.float64).max)
_MISSING = frozenset({"", "?", "na", "n/a", "nan", "none", "null"})
# Python's warning filters belong to the process: two threads collecting warnings at the same time would mix them up.
_collecting = threading.Lock()


@dataclass(frozen=True)
class Plan:
    """The weeks that are held out: the last `windows` times `horizon`, window 1 the oldest.

    Before each window a model is fitted to all earlier weeks (an expanding history), and forecasts the window.
    """

    horizon: int
    windows: int

    @property
    def held_out(self) -> int:
        """The number of weeks that are forecast in all."""
        return self.horizon * self.windows

    def start(self, window: int, weeks: int) -> int:
        """Return the position of the first week of a window in a series of that many weeks."""
        return weeks - (self.windows - window + 1) * self.horizon

    def weeks_of(self, window: int, weeks: int) -> slice:
        """Return the positions of the weeks of a window."""
        start = self.start(window, weeks)
        return slice(start, start + self.horizon)


@dataclass(frozen=True)
class Forecast:
    """A model's forecast, or its failure.

    Attributes:
        points: A value for each week; empty when it failed.
        warnings: Its warnings, each once, as `2 x ConvergenceWarning: …`.
        failure: The reason for a failure, or empty.
    """

    points: tuple[float, ...]
    warnings: tuple[str, ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class Backtest:
    """A model's forecast of one window."""

    model: ModelName
    window: int
    forecast: Forecast


@dataclass(frozen=True)
class Score:
    """The accuracy of a model's forecasts; no figures when it failed on a window.

    Attributes:
        mase: Mean absolute scaled error, mean over the windows.
        rmse: Root of the mean squared error, in the unit of the series.
        mae: Mean absolute error, in the unit of the series.
        smape: Symmetric mean absolute percentage error, 0 to 200.
        windows: The number of windows that the model forecast.
        warnings: Its warnings, over all windows.
        failures: The reasons of its failures, by window.
    """

    model: ModelName
    mase: float | None
    rmse: float | None
    mae: float | None
    smape: float | None
    windows: int
    warnings: tuple[str, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """The prediction of next week, with the interval that contains it with a probability of `COVERAGE` percent.

    Attributes:
        week: The Sunday that the week ends on.
        value: In the unit of the series, as `low` and `high`.
        errors: The number of one-step-ahead errors that the interval comes from.
    """

    model: ModelName
    week: date
    value: float
    low: float
    high: float
    errors: int


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: every backtest, the scores with the best first, and next week."""

    source: str
    plan: Plan
    backtests: Sequence[Backtest]
    ranked: Sequence[Score]
    prediction: Prediction


def check_plan(plan: Plan) -> None:
    """Check that a plan holds out enough weeks for the interval.

    Raises:
        InputError: it does not; names both parameters and the minimum.
    """
    if plan.held_out < MINIMUM_ERRORS:
        raise InputError(
            f"horizon {plan.horizon} and windows {plan.windows} hold out {plan.held_out} weeks; "
            f"horizon times windows must be at least {MINIMUM_ERRORS}"
        )


def observations(text: str, date_column: str, value_column: str) -> pd.Series[float]:
    """Parse the observations of a CSV, by day, sorted.

    Args:
        text: CSV with a header; dates are ISO 8601 (those with an offset count by their day in UTC), empty values and
            NA, NaN, null, None, ? are missing.
        date_column: Name of the column with the dates.
        value_column: Name of the column with the values.

    Raises:
        InputError: a column or a row is invalid; names the line (from 1) and the column.
    """
    lines, dates, values = _cells(text, date_column, value_column)
    days = pd.to_datetime(pd.Series(dates, dtype=str), format="ISO8601", errors="coerce", utc=True)
    _refuse(days.isna(), lines, dates, date_column, "an ISO 8601 date such as 2026-01-31")
    missing = pd.Series([value.casefold() in _MISSING for value in values], dtype=bool)
    numbers = pd.to_numeric(pd.Series(values, dtype=str).mask(missing), errors="coerce").astype(float)
    _refuse(~numbers.between(-_LARGEST, _LARGEST) & ~missing, lines, values, value_column, "a finite number")
    again = days.mask(missing).duplicated() & ~missing
    if again.any():
        row = int(again.to_numpy().argmax())
        first = lines[int((days.eq(days[row]) & ~missing).to_numpy().argmax())]
        raise InputError(f"line {lines[row]}, column {date_column!r}: {dates[row]!r} is a duplicate of line {first}")
    numbers.index = pd.DatetimeIndex(days.dt.tz_localize(None).dt.normalize())
    return numbers.dropna().sort_index()


def weekly(observed: pd.Series[float], before: date) -> pd.Series[float]:
    """Compute the means of the weeks that end on Sundays before a day; an unfinished week would distort the last one.

    Args:
        observed: Observations by day.
        before: The day on which the forecast is made.

    Raises:
        InputError: no such week has an observation.
    """
    finished = observed[observed.index <= last_sunday(before)]
    if finished.empty:
        raise InputError(f"no observation in a week that ended before {before}")
    return finished.resample("W-SUN").mean()


def last_sunday(before: date) -> pd.Timestamp:
    """Return the last Sunday before a day."""
    return pd.Timestamp(before) - pd.Timedelta(days=before.isoweekday())


def stale(last: date, due: date, most: int) -> str:
    """Describe a series whose last week is older than that many weeks on a day; empty if it is not.

    Args:
        last: The Sunday on which its last week ends.
        due: The day on which the forecast is made.
        most: Weeks that the last week may have ended before the last Sunday.
    """
    weeks = (last_sunday(due).date() - last).days // 7
    if weeks <= most:
        return ""
    return f"stale data: the last week ended on {last}, {weeks:,} weeks before the last full week"


def check_series(series: pd.Series[float], plan: Plan) -> None:
    """Check that models can be compared on a series by this plan.

    Raises:
        InputError: too few weeks, a window or the interval without observations, or values that never change.
    """
    weeks = len(series)
    needed = plan.held_out + MINIMUM_HISTORY
    if weeks < needed:
        raise InputError(
            f"{weeks} weeks, but {plan.windows} windows of {plan.horizon} weeks need at least {needed} in all"
        )
    for window in range(1, plan.windows + 1):
        held_out = series.iloc[plan.weeks_of(window, weeks)]
        if held_out.isna().all():
            raise InputError(
                f"no observation in window {window}, the weeks that end {held_out.index[0]:%Y-%m-%d} to "
                f"{held_out.index[-1]:%Y-%m-%d}; use a longer horizon"
            )
    observed = int(series.iloc[-plan.held_out :].notna().sum())
    if observed < MINIMUM_ERRORS:
        raise InputError(
            f"{observed} observed weeks in the windows; the interval needs at least {MINIMUM_ERRORS}: "
            "use a longer horizon"
        )
    first = filled(_values(series)[: plan.start(1, weeks)])
    if _naive_error(first) == 0:
        raise InputError(
            f"the first {len(first)} weeks are all {first[0]:g}; models cannot be compared on values that never change"
        )


def filled(history: FloatArray) -> FloatArray:
    """Fill the gaps of a history: on the line between their neighbours, at the end with the last observation.

    Pass only what lies before the forecast: the line across a gap would otherwise use the week to be forecast.
    """
    return np.asarray(pd.Series(history).interpolate().to_numpy(), dtype=np.float64)


def forecast(model: ModelName, history: FloatArray, weeks: int) -> Forecast:
    """Forecast with a model; its errors are returned as a failure, never raised.

    Args:
        model: One of `MODEL_NAMES`.
        history: Weekly values, NaN for a gap.
        weeks: Number of weeks after the last one.
    """
    with _collecting, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The garbage collector gives these while the model computes, of objects that others left.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            values = predict(model, filled(history), weeks)
            failure = "" if np.isfinite(values).all() else "a forecast is not a finite number"
        except Exception as error:  # noqa: BLE001 - whatever a model raises is that model's failure, and is reported
            failure = f"{type(error).__name__}: {error}"
    counted = Counter(f"{warning.category.__name__}: {warning.message}" for warning in caught)
    said = tuple(f"{times} x {text}" for text, times in counted.items())
    return Forecast(() if failure else tuple(map(float, values)), said, failure)


def backtest(model: ModelName, window: int, series: pd.Series[float], plan: Plan) -> Backtest:
    """Forecast a window with a model from all earlier weeks."""
    history = _values(series)[: plan.start(window, len(series))]
    return Backtest(model, window, forecast(model, history, plan.horizon))


def one_step_errors(model: ModelName, window: int, series: pd.Series[float], plan: Plan) -> list[float]:
    """Compute actual minus forecast of each observed week of a window, refitted to all weeks before it.

    A week that the model cannot forecast gives no error.
    """
    values, weeks = _values(series), plan.weeks_of(window, len(series))
    return [
        float(values[week] - said.points[0])
        for week in range(weeks.start, weeks.stop)
        if not np.isnan(values[week]) and not (said := forecast(model, values[:week], 1)).failure
    ]


def scores(backtests: Iterable[Backtest], series: pd.Series[float], plan: Plan) -> list[Score]:
    """Score each model, best first: by MASE, then the simpler model; those that failed are last.

    With e the errors of a window's observed weeks and y its history,
    MASE = mean|e| / mean|y[t] - y[t-1]|: 1 is as accurate as repeating the last value, one week ahead, in the history.
    Source: Hyndman and Koehler (2006), International Journal of Forecasting 22, 679-688.
    sMAPE = mean(200 |e| / (|actual| + |forecast|)), 0 where both are 0.
    Source: Makridakis (1993), International Journal of Forecasting 9, 527-529.
    """
    by_model: dict[ModelName, list[Backtest]] = {}
    for done in backtests:
        by_model.setdefault(done.model, []).append(done)
    found = [_score(model, by_model[model], series, plan) for model in MODEL_NAMES if model in by_model]
    return sorted(found, key=lambda score: math.inf if score.mase is None else score.mase)


def winner(ranked: Sequence[Score]) -> Score:
    """Return the first of the ranked scores.

    Raises:
        InputError: no model forecast every window; gives the reasons.
    """
    if ranked[0].mase is None:
        reasons = "; ".join(f"{score.model} on {score.failures[0]}" for score in ranked)
        raise InputError(f"no model forecast every window: {reasons}")
    return ranked[0]


def next_week(model: ModelName, series: pd.Series[float], errors: Sequence[float]) -> Prediction:
    """Predict next week with the model refitted to all weeks, and an interval from its one-step-ahead errors.

    The interval is split conformal: plus and minus the k-th smallest absolute error, k = ceil(coverage * (n + 1)).
    Source: Lei, G'Sell, Rinaldo, Tibshirani and Wasserman (2018), Journal of the American Statistical Association 113,
    1094-1111.

    Raises:
        InputError: the model cannot be fitted to all weeks, or has too few errors for the interval.
    """
    if len(errors) < MINIMUM_ERRORS:
        raise InputError(
            f"{model} forecast {len(errors)} held-out weeks one week ahead; the interval needs {MINIMUM_ERRORS}"
        )
    said = forecast(model, _values(series), 1)
    if said.failure:
        raise InputError(f"{model}, the best model, failed on the whole series: {said.failure}")
    value, margin = said.points[0], interval(errors)
    week = series.index[-1] + pd.Timedelta(weeks=1)
    return Prediction(model, week.date(), value, value - margin, value + margin, len(errors))


def interval(errors: Sequence[float]) -> float:
    """Return half the width of the interval that `next_week` describes."""
    rank = math.ceil(COVERAGE * (len(errors) + 1) / 100)
    return float(np.sort(np.abs(errors))[rank - 1])


def summary(outcome: Outcome, series: pd.Series[float]) -> dict[str, Any]:
    """Return the outcome as JSON-serialisable values."""
    prediction = outcome.prediction
    return {
        "winner": prediction.model,
        "prediction": asdict(prediction) | {"week": prediction.week.isoformat()},
        "models": [
            asdict(score) | {"warnings": list(score.warnings), "failures": list(score.failures)}
            for score in outcome.ranked
        ],
        "series": {
            "source": outcome.source,
            "weeks": len(series),
            "filled": int(series.isna().sum()),
            "first": f"{series.index[0]:%Y-%m-%d}",
            "last": f"{series.index[-1]:%Y-%m-%d}",
        },
    }


def backtest_table(outcome: Outcome, series: pd.Series[float]) -> pd.DataFrame:
    """Tabulate every forecast: model, window, week, forecast, actual (NaN where nothing was observed)."""
    parts = [
        pd.DataFrame(
            {
                "model": done.model,
                "window": done.window,
                "week": held_out.index,
                "forecast": done.forecast.points,
                "actual": held_out.to_numpy(),
            }
        )
        for done in outcome.backtests
        if not done.forecast.failure
        for held_out in [series.iloc[outcome.plan.weeks_of(done.window, len(series))]]
    ]
    return pd.concat(parts, ignore_index=True)


def _cells(text: str, date_column: str, value_column: str) -> tuple[list[int], list[str], list[str]]:
    """Return the line, date and value of each row, unparsed."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines, dates, values = [], [], []
    try:
        header = [name.strip() for name in next(reader)]
        date_place, value_place = _place(date_column, header), _place(value_column, header)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(f"line {reader.line_num}: {len(row)} columns; the header has {len(header)}")
            lines.append(reader.line_num)
            dates.append(row[date_place].strip())
            values.append(row[value_place].strip())
    except csv.Error as error:
        raise InputError(f"line {reader.line_num}: {error}") from None
    return lines, dates, values


def _place(column: str, header: list[str]) -> int:
    if column not in header:
        raise InputError(f"column {column!r} is missing; found: {', '.join(header)}")
    if header.count(column) > 1:
        raise InputError(f"duplicate column {column!r}")
    return header.index(column)


def _refuse(bad: pd.Series[bool], lines: list[int], cells: list[str], column: str, wanted: str) -> None:
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise InputError(f"line {lines[row]}, column {column!r}: {cells[row]!r} is not {wanted}")


def _score(model: ModelName, backtests: list[Backtest], series: pd.Series[float], plan: Plan) -> Score:
    said = tuple(dict.fromkeys(text for done in backtests for text in done.forecast.warnings))
    failures = tuple(f"window {done.window}: {done.forecast.failure}" for done in backtests if done.forecast.failure)
    done_windows = len(backtests) - len(failures)
    if done_windows < plan.windows:
        return Score(model, None, None, None, None, done_windows, said, failures)
    values = _values(series)
    scaled, errors, shares = [], [], []
    for done in backtests:
        weeks = plan.weeks_of(done.window, len(values))
        actual, predicted = values[weeks], np.array(done.forecast.points)
        observed = ~np.isnan(actual)
        actual, predicted = actual[observed], predicted[observed]
        error = np.abs(actual - predicted)
        size = np.abs(actual) + np.abs(predicted)
        scaled.append(error.mean() / _naive_error(filled(values[: weeks.start])))
        errors.append(error)
        shares.append(200 * error / np.where(size == 0, 1, size))
    every = np.concatenate(errors)
    return Score(
        model=model,
        mase=float(np.mean(scaled)),
        rmse=float(np.sqrt(np.mean(every**2))),
        mae=float(every.mean()),
        smape=float(np.concatenate(shares).mean()),
        windows=done_windows,
        warnings=said,
        failures=(),
    )


def _values(series: pd.Series[float]) -> FloatArray:
    return np.asarray(series, dtype=np.float64)


def _naive_error(history: FloatArray) -> float:
    """Return the mean absolute error of repeating the last value, one week ahead."""
    return float(np.abs(np.diff(history)).mean())

"""weekly-forecast: find the best model for a weekly series and predict next week.

Produces: `forecast/<run id>/` with the weekly series, every backtest and the summary; the table of models, a page with
a chart, and the artifact `next-week`, whose history is every prediction made.
Deployment: `weekly-forecast`, Mondays at 00:00 (prefect.yaml).
Idempotent: a run writes below its own id only, and the same series gives the same files. A retry does not read the
source again, nor repeat finished backtests.
Runbook: docs/runbooks/weekly-forecast.md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, get_run_logger, task, unmapped
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.tasks import Task
from pydantic import Field

from flows.forecast.models import MODEL_NAMES, ModelName
from tidepool import report, storage
from tidepool.compute import dask_runner
from tidepool.errors import InputError, TidepoolError, not_utf8

if TYPE_CHECKING:
    import pandas as pd

    from flows.forecast.transform import Backtest, Outcome, Plan, Prediction, Score

NAME = "weekly-forecast"
CO2 = "statsmodels:co2"

# Doubling from 1 s to 40 s. The jitter adds up to a half, so that no wait exceeds 60 s. 26 minutes in all.
RETRY_JITTER = 0.5
RETRY_DELAYS = [min(2.0**attempt, 60 / (1 + RETRY_JITTER)) for attempt in range(42)]


@flow(
    name=NAME,
    flow_run_name=report.run_name("{source}, {windows} windows of {horizon} weeks"),
    task_runner=dask_runner("small", start_early=True),
    timeout_seconds=2 * 60 * 60,
)
def weekly_forecast(
    *,
    source: Annotated[str, Field(min_length=1)] = CO2,
    date_column: Annotated[str, Field(min_length=1)] = "date",
    value_column: Annotated[str, Field(min_length=1)] = "co2",
    models: Annotated[Sequence[ModelName], Field(min_length=1)] = MODEL_NAMES,
    horizon: Annotated[int, Field(ge=1, le=52)] = 8,
    windows: Annotated[int, Field(ge=1, le=52)] = 4,
    max_age_weeks: Annotated[int | None, Field(ge=0)] = None,
) -> dict[str, Any]:
    """Find the best time-series model for a weekly series and predict next week.

    Args:
        source: CSV of observations with a header: a path, or a file, s3 or http(s) URL; statsmodels:co2 is the CO2
            series of Mauna Loa. Weeks end on Sunday and are the mean of their days. A week that has not ended when the
            run is due is left out.
        date_column: Column of the dates, ISO 8601 (2026-01-31), daily or irregular.
        value_column: Column of the values; an empty cell is a missing value.
        models: The models that compete; the smallest mean absolute scaled error wins.
        horizon: Weeks that each model forecasts per window, without having seen them, 1 to 52.
        windows: Windows that each model forecasts, one after another, 1 to 52; horizon times windows is at least 4.
        max_age_weeks: Age of the last week of the source, in weeks from 0, above which the run fails. Empty: it warns
            above two weeks.

    Returns:
        `winner`, the `prediction` of next week with its 80 % interval, the `models` with their figures, best first,
        and a description of the `series`.

    Raises:
        InputError: the parameters or the data allow no comparison, or the data is older than `max_age_weeks`.
    """
    from flows.forecast import transform

    storage.keep_results()
    plan = transform.Plan(horizon, windows)
    transform.check_plan(plan)
    folder = f"forecast/{flow_run.id}"
    due = flow_run.scheduled_start_time.date()
    series = get_data(source, date_column, value_column, due=due, plan=plan, folder=folder)
    stale = check_age(source, series, due, max_age_weeks)

    backtests = run_backtests([name for name in MODEL_NAMES if name in models], series, plan)
    ranked = compare(source, series, plan, backtests)
    best = transform.winner(ranked)
    errors = one_step.map(unmapped(best.model), range(1, windows + 1), unmapped(series), unmapped(plan)).result()
    prediction = next_week(best.model, series, [error for window in errors for error in window])
    return publish(transform.Outcome(source, plan, backtests, ranked, prediction), series, folder, stale)


def check_age(source: str, series: str, due: date, max_age_weeks: int | None) -> str:
    """Warn of a series that ends more than two weeks before the run, or fail beyond a given age.

    Returns:
        The warning; empty for a series that is not that old.

    Raises:
        InputError: it is older than `max_age_weeks`.
    """
    from flows.forecast import transform

    last = _series(series).index[-1].date()
    stale = transform.stale(last, due, transform.FRESH_WEEKS if max_age_weeks is None else max_age_weeks)
    if stale and max_age_weeks is not None:
        raise InputError(f"{source}: {stale}; at most {max_age_weeks} weeks are allowed (max_age_weeks)")
    if stale:
        report.warn(f"{source}: {stale}; predicted is the week after it")
    return stale


class EmptyAnswerError(TidepoolError):
    """A source that has no observations, perhaps not yet."""


def _is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry after a network error, a server's error or an empty answer; a wrong column will be wrong again."""
    return isinstance(state.data, EmptyAnswerError) or storage.is_transient(state.data)


@task(
    persist_result=True,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_jitter_factor=RETRY_JITTER,
    retry_condition_fn=_is_transient,
    task_run_name=report.task_name("get {source}"),
)
def get_data(source: str, date_column: str, value_column: str, *, due: date, plan: Plan, folder: str) -> str:
    """Write the weekly series of the weeks before the day the run is due, checked; return its URL."""
    from flows.forecast import transform

    try:
        observed = _observations(source, date_column, value_column)
        weekly = transform.weekly(observed, due)
        transform.check_series(weekly, plan)
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: {not_utf8(error)}; expected a CSV") from None
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    later = int((observed.index > weekly.index[-1]).sum())
    get_run_logger().info(
        "%s: %s weeks, %s of them filled; %s observations of later days left out",
        *(source, len(weekly), weekly.isna().sum(), later),
    )
    return storage.put_frame(f"{folder}/series.parquet", weekly.rename("value").rename_axis("week").reset_index())


@task(
    persist_result=True,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_is_transient,
    task_run_name="backtest-{model}-{window}",
)
def backtest(model: ModelName, window: int, series: str, plan: Plan) -> Any:
    """Forecast a window with a model; the state is named `ModelFailed` when the model cannot."""
    from flows.forecast import transform

    done = transform.backtest(model, window, _series(series), plan)
    if not done.forecast.failure:
        return done
    message = f"{model} failed on window {window}: {done.forecast.failure}"
    get_run_logger().warning(message)
    return Completed(name="ModelFailed", message=message, data=done)


@task
def compare(source: str, series: str, plan: Plan, backtests: list[Backtest]) -> list[Score]:
    """Rank the models, best first, and publish them as the artifact `weekly-forecast-models`."""
    from flows.forecast import page, transform

    ranked = transform.scores(backtests, _series(series), plan)
    best = ranked[0]
    result = "no model forecast every window" if best.mase is None else f"{best.model}, MASE {best.mase:.4g}"
    report.table(f"{NAME}-models", page.model_rows(ranked, plan), f"{source}: {result}")
    return ranked


@task(
    persist_result=True,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_is_transient,
    task_run_name="one-step-{model}-{window}",
)
def one_step(model: ModelName, window: int, series: str, plan: Plan) -> list[float]:
    """Compute the winner's errors one week ahead, refitted before each week of a window."""
    from flows.forecast import transform

    return transform.one_step_errors(model, window, _series(series), plan)


@task(task_run_name="next-week-{model}")
def next_week(model: ModelName, series: str, errors: list[float]) -> Prediction:
    """Refit the winner to all weeks and predict the next one."""
    from flows.forecast import transform

    return transform.next_week(model, _series(series), errors)


@task
def publish(outcome: Outcome, series: str, folder: str, stale: str) -> dict[str, Any]:
    """Write the files of the run, then publish its page and its prediction."""
    from flows.forecast import page, transform

    weekly, prediction = _series(series), outcome.prediction
    summary = transform.summary(outcome, weekly)
    backtests = transform.backtest_table(outcome, weekly)
    files = [
        series,
        storage.put_frame(f"{folder}/backtests.parquet", backtests),
        storage.write(f"{folder}/summary.json", json.dumps(summary, indent=2, allow_nan=False).encode()),
    ]
    result = page.headline(prediction)
    report.page(f"{NAME}-report", page.page(outcome, weekly, stale), result)
    report.table("next-week", [page.prediction_row(outcome)], result)
    report.outputs(NAME, files)
    get_run_logger().info("%s: %s", outcome.source, result)
    return summary


def run_backtests(models: Sequence[ModelName], series: str, plan: Plan) -> list[Backtest]:
    """Run every model on every window, one task run each, and show the progress."""
    pairs = [(model, window) for model in models for window in range(1, plan.windows + 1)]
    names, windows = zip(*pairs, strict=True)
    futures = backtest.map(list(names), list(windows), unmapped(series), unmapped(plan))
    progress = report.Progress(f"{NAME}-progress", len(futures), "backtests")
    done: list[Backtest] = []
    for future in futures:
        done.append(future.result())
        progress.update(len(done))
    return done


def _observations(source: str, date_column: str, value_column: str) -> pd.Series[float]:
    from flows.forecast import transform

    text = _co2() if source == CO2 else storage.read(storage.source(source)).decode("utf-8-sig")
    observed = transform.observations(text, date_column, value_column) if text.strip() else None
    if observed is None or observed.empty:
        # A local file does not fill while a run waits; a server's answer may.
        kind = InputError if storage.source(source).startswith("file://") else EmptyAnswerError
        raise kind(f"no observations; expected a CSV with columns {date_column!r} and {value_column!r}")
    return observed


def _co2() -> str:
    """Return the weekly CO2 series of Mauna Loa, 1958 to 2001, that comes with statsmodels, as CSV."""
    from statsmodels.datasets import co2

    table = co2.load_pandas().data
    return str(table.to_csv(index_label="date"))


def _series(url: str) -> pd.Series[float]:
    return storage.get_frame(url).set_index("week")["value"]

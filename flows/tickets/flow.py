"""ticket-model-evaluation: measure how well a model predicts the time until a ticket is closed.

Produces: `tickets/trials/<trial id>.json`, the summary of each trial, and `tickets/history.json`, the last of them; in
the UI the table of the last trials and a page with their metrics drawn.
Deployment: `ticket-model-evaluation`, every minute (prefect.yaml); a run that finds another one running is cancelled.
Idempotent: the trial's id, its sample and its resamples derive from the id of the flow run, so that a re-run writes the
same file again, and its line replaces the previous one in the history. A retry repeats no finished share of resamples.
The trials' files are the record; history and table are views of the last ones, so that a run reads one file however
many trials there are.
Runbook: docs/runbooks/ticket-model-evaluation.md
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from pydantic import Field

from tidepool import report, storage
from tidepool.compute import dask_runner
from tidepool.errors import InputError
from tidepool.settings import settings

if TYPE_CHECKING:
    import pandas as pd

    from flows.tickets.transform import Trial

NAME = "ticket-model-evaluation"
# Every run publishes the whole history: an hour of trials keeps the server's database small.
HISTORY = 60
HISTORY_FILE = "tickets/history.json"
# Mapped tasks of one bootstrap: enough to keep a small cluster busy to the end.
SHARES = 16


@flow(
    name=NAME,
    task_runner=dask_runner("small"),
    flow_run_name=report.run_name("evaluate {batch_size} tickets"),
    timeout_seconds=900,
)
def ticket_model_evaluation(
    source: Annotated[str, Field(min_length=1)] = "samples/incident_event_log.csv",
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 100,
    seed: Annotated[int | None, Field(ge=0)] = None,
    resamples: Annotated[int, Field(ge=0, le=10_000)] = 0,
) -> dict[str, Any]:
    """Evaluate a model that predicts, from its priority, how long a ticket will take to close.

    Args:
        source: The event log of the tickets: a CSV, or a ZIP that holds incident_event_log.csv; a path, or a file, s3
            or http(s) URL. Its times are day-month-year hour:minute, such as 29-02-2016 01:16.
        batch_size: Distinct tickets to draw at random, 1 to 1,000,000; all of them, in the file's order, when there
            are fewer.
        seed: Makes the sample repeatable; from 0. Empty: a different sample for each run.
        resamples: Bootstrap resamples for 95 % confidence intervals, 0 to 10,000; computed on a Dask cluster when
            they are many. 0: none.

    Returns:
        `{"id", "data": {"num_obs", "num_dropped", "metrics", "target"}}`, times in seconds; with resamples, data also
        has `intervals`.

    Raises:
        InputError: the source is not an event log, or no ticket drawn from it has both its times.
    """
    trial = make_trial_id(str(flow_run.id))
    chosen_seed = uuid.UUID(trial).int if seed is None else seed
    tickets = draw_batch(source, batch_size, chosen_seed)
    actual = compute_target(tickets, source)
    predicted = predict(tickets)
    measured = measure(actual, predicted)
    confidence = bootstrap(trial, actual, predicted, chosen_seed, resamples) if resamples else None
    summary = summarise(trial, actual, measured, confidence)
    url = write_trial(summary)
    publish(summary, source, url)
    report.outputs(NAME, [url])
    return summary


@task
def make_trial_id(run_id: str) -> str:
    """Derive the UUID of the trial, the same for each attempt of a flow run."""
    return str(uuid.uuid5(uuid.UUID(run_id), NAME))


@task(
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=storage.retry_transient_errors,
    task_run_name="draw {batch_size} tickets",
)
def draw_batch(source: str, batch_size: int, seed: int) -> pd.DataFrame:
    """Draw the distinct tickets of the trial, with their times."""
    from flows.tickets import transform

    tickets = transform.read(storage.read(storage.source(source)), source)
    return transform.parse_timestamps(transform.sample(tickets, batch_size, seed))


# The inputs of the following tasks are tables: hashing them for a cache would cost more than the tasks themselves.
@task(cache_policy=NO_CACHE)
def compute_target(tickets: pd.DataFrame, source: str) -> pd.Series[float]:
    """Compute the seconds from each ticket's update to its closing; NaN when a time is missing or unreadable."""
    from flows.tickets import transform

    actual = transform.target(tickets)
    if left_out := int(actual.isna().sum()):
        if left_out == len(actual):
            raise InputError(
                f"{source}: none of the {left_out} tickets drawn has both sys_updated_at and closed_at "
                "(day-month-year hour:minute); nothing is left to evaluate"
            )
        get_run_logger().warning(
            "%s of %s tickets left out: closed_at or sys_updated_at is missing or unreadable", left_out, len(actual)
        )
    return actual


@task(cache_policy=NO_CACHE)
def predict(tickets: pd.DataFrame) -> pd.Series[float]:
    """Predict the seconds that each ticket will take."""
    from flows.tickets import transform

    return transform.predict(tickets["priority"])


@task(cache_policy=NO_CACHE)
def measure(actual: pd.Series[float], predicted: pd.Series[float]) -> dict[str, float | None]:
    """Compute the metrics of the prediction."""
    from flows.tickets import transform

    return transform.metrics(transform.pairs(actual, predicted))


def bootstrap(
    trial: str, actual: pd.Series[float], predicted: pd.Series[float], seed: int, resamples: int
) -> dict[str, list[float] | None]:
    """Compute the confidence intervals of the metrics: in this process when they are few, otherwise on the cluster.

    Both give the same numbers. The cluster reads the rows from the store, from which they are deleted afterwards.
    """
    from flows.tickets import transform

    known = transform.pairs(actual, predicted)
    if len(known) * resamples <= settings().compute.inline_rows:
        return transform.intervals([transform.resample(known, seed, 0, resamples)])

    storage.keep_results()
    firsts, counts = zip(*transform.shares(resamples, SHARES), strict=True)
    # By content: a retry that has drawn other rows, of a changed source, takes over no share of the first ones.
    rows = hashlib.sha256(known.to_csv().encode()).hexdigest()[:16]
    url = storage.put_frame(f"tickets/resamples/{trial}-{rows}.parquet", known)
    progress = report.Progress(f"{NAME}-resamples", len(firsts), "Shares of the resamples")
    parts = []
    try:
        futures = resample.map(unmapped(url), unmapped(seed), list(firsts), list(counts))
        for done, future in enumerate(futures, start=1):
            parts.append(future.result())
            progress.update(done)
    finally:
        storage.delete(url)
    return transform.intervals(parts)


@task(
    persist_result=True,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=storage.retry_transient_errors,
    task_run_name="resample-{first}",
)
def resample(url: str, seed: int, first: int, count: int) -> dict[str, list[float]]:
    """Compute the metrics of a share of the resamples of the rows at the URL."""
    from flows.tickets import transform

    return transform.resample(storage.get_frame(url), seed, first, count)


@task(cache_policy=NO_CACHE)
def summarise(
    trial: str,
    actual: pd.Series[float],
    measured: dict[str, float | None],
    confidence: dict[str, list[float] | None] | None,
) -> dict[str, Any]:
    """Summarise the trial."""
    from flows.tickets import transform

    return transform.summarise(trial, actual, measured, confidence)


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=storage.retry_transient_errors)
def write_trial(summary: dict[str, Any]) -> str:
    """Write the summary as JSON; return its URL."""
    text = json.dumps(summary, indent=2, allow_nan=False)
    return storage.write(f"tickets/trials/{summary['id']}.json", f"{text}\n".encode())


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=storage.retry_transient_errors)
def publish(summary: dict[str, Any], source: str, url: str) -> None:
    """Add the trial to the history of the last trials, and show it as a table and a plot."""
    from flows.tickets import transform

    time = flow_run.scheduled_start_time.strftime("%Y-%m-%d %H:%M:%S")
    history = transform.extend(_last_history(), transform.line(summary, time, source), HISTORY)
    rows = transform.rows(history)
    storage.write(HISTORY_FILE, f"{json.dumps(rows, indent=2)}\n".encode())
    result = transform.headline(summary)
    get_run_logger().info("%s: %s", result, url)
    shown = "The first trial" if len(rows) == 1 else f"The last {len(rows)} trials, newest first"
    report.table(f"{NAME}-history", rows, f"{shown} · {result}")
    report.page(f"{NAME}-report", transform.markdown(summary, source, url, _drawing(history)), result)


def _last_history() -> list[Trial]:
    """Read the history that the previous run wrote; empty for the first run."""
    from flows.tickets import transform

    if not storage.exists(HISTORY_FILE):
        return []
    try:
        return transform.read_history(storage.read(HISTORY_FILE).decode())
    except ValueError as error:
        # A view must not fail the evaluation, minute after minute, until a user deletes the file.
        get_run_logger().warning(
            "%s does not hold a history of trials; starting a new one: %s", storage.url(HISTORY_FILE), error
        )
        return []


def _drawing(history: list[Trial]) -> str:
    figure, axes = report.axes(height=2.6)
    oldest_first = history[::-1]
    numbers = range(1 - len(history), 1)
    for label, values in (
        ("MAE", [trial.mae_hours for trial in oldest_first]),
        ("MedAE", [trial.medae_hours for trial in oldest_first]),
        ("RMSE", [trial.rmse_hours for trial in oldest_first]),
    ):
        axes.plot(numbers, values, marker=".", label=label)
    axes.set_xlabel("trial (0: this one)")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_ylabel("hours")
    axes.set_ylim(bottom=0)
    axes.legend(ncols=3)
    return report.picture(figure, f"MAE, MedAE and RMSE, in hours, of the last {len(history)} trials")

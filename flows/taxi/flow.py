"""New York taxi rides: `taxi-tip-amounts` and `most-generous-riders`.

`taxi-tip-amounts` computes the mean tip by passenger count of all rides in a set of files: table, chart and
`taxi/<run id>/tip_amounts.parquet`. `most-generous-riders` finds the rides with the largest share of the total paid as
a tip: table, page, `taxi/<run id>/top_riders.parquet`, and a message to the targets in TIDEPOOL_NOTIFY_URLS.

Deployments `taxi-tip-amounts` and `most-generous-riders`, nightly. Idempotent: inputs are only read, and each run
writes below its own id, the same files again when it is retried. A retry repeats no finished reading, and no hour.

Runbooks: docs/runbooks/taxi-tip-amounts.md, docs/runbooks/most-generous-riders.md.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from prefect import Flow, flow, get_run_logger, runtime, task, unmapped
from prefect.client.schemas.objects import FlowRun, State
from prefect.futures import PrefectFutureList
from prefect.logging.loggers import flow_run_logger
from prefect.utilities.urls import url_for
from pydantic import ByteSize, Field

from tidepool import notify, report, storage
from tidepool.compute import dask_client, dask_runner
from tidepool.errors import InputError

# The public data of the Taxi and Limousine Commission, as laid out in its bucket.
_PUBLIC = "s3://nyc-tlc/trip data/yellow_tripdata_2019-"
_BLOCKSIZE = ByteSize(16 * 1024**2)
# Rides in the report.
_TOP = 10
_CLEAN_RETRIES = 5
# Chunks are small: the store's latency dominates.
_WRITERS = 16


@flow(name="taxi-tip-amounts", flow_run_name=report.run_name("tips in {source}"), timeout_seconds=2 * 3600)
def taxi_tip_amounts(
    source: Annotated[str, Field(min_length=1)] = f"{_PUBLIC}*.parquet",
    blocksize: Annotated[ByteSize, Field(ge=64 * 1024, le=1024**3)] = _BLOCKSIZE,
    n_workers: Annotated[int, Field(ge=1, le=64)] = 2,
) -> dict[str, Any]:
    """Compute the mean tip by passenger count.

    Args:
        source: CSV or Parquet files of taxi rides: a path, or a file, s3 or http(s) URL; * matches several. The
            column names of yellow and green files and of the sample are recognised.
        blocksize: Size of a partition, 64 KiB to 1 GiB: bytes, or text such as 16 MiB.
        n_workers: Dask workers that read the files, 1 to 64.

    Returns:
        The summary: rides read and left out, and the mean tip (US dollars) and rides of each passenger count.
    """
    storage.keep_results()
    means = mean_tips(source, blocksize, n_workers)
    tips = presentable_tips(means)
    return publish_tips(source, tips, rides=sum(row["rides"] for row in means))


@task(persist_result=True, retries=2, retry_delay_seconds=10, retry_condition_fn=storage.retry_transient_errors)
def mean_tips(source: str, blocksize: int, n_workers: int) -> list[dict[str, Any]]:
    """Compute mean tip and number of rides by passenger count, on a Dask cluster that is closed with this task."""
    from flows.taxi import files, transform

    urls = files.matching(source)
    wanted = ("passengers", "tip")
    try:
        with dask_client("small", workers=n_workers):
            rides = files.all_rows(urls, wanted, blocksize)
            get_run_logger().info("Reading %s files in %s partitions", len(urls), rides.npartitions)
            # dropna=False: rides without a passenger count are counted too, to report how many are left out.
            means = rides.groupby("passengers", dropna=False)["tip"].agg(["mean", "size"]).compute()
            # Dask reads an infinite tip and a count beyond all integers as numbers.
            if means["mean"].abs().max() == float("inf"):
                files.check_values(urls, wanted)
    except files.BROKEN:
        files.check_values(urls, wanted)
        raise
    return transform.records(means.reset_index().rename(columns={"mean": "tip", "size": "rides"}))


@task
def presentable_tips(means: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the means of passenger counts above 0, rounded to cents."""
    import pandas as pd

    from flows.taxi import transform

    return transform.records(transform.tips_by_passengers(pd.DataFrame(means)))


@task
def publish_tips(source: str, tips: list[dict[str, Any]], rides: int) -> dict[str, Any]:
    """Write the file, and publish table and chart.

    Returns:
        The flow's summary.
    """
    import pandas as pd

    from flows.taxi import pages

    url = storage.put_frame(f"taxi/{runtime.flow_run.id}/tip_amounts.parquet", pd.DataFrame(tips))
    summary = {
        "source": source,
        "rides": rides,
        "left_out": rides - sum(row["rides"] for row in tips),
        "tips": tips,
    }
    headline = pages.tips_headline(summary)
    report.table("taxi-tip-amounts-table", tips, headline)
    report.page("taxi-tip-amounts-chart", pages.tips(summary, url), headline)
    report.outputs("taxi-tip-amounts", [url])
    return summary


def notify_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Send the reason of a failed run, with its link."""
    reason = f"{state.message}\n\n{_link(str(flow_run.id))}"
    notify.send(flow_run_logger(flow_run, flow), f"{flow.name} failed", reason, "failure")


@flow(
    name="most-generous-riders",
    task_runner=dask_runner("small", start_early=True),
    flow_run_name=report.run_name("first {nrows} rows of {source}"),
    timeout_seconds=3600,
    on_failure=[notify_failure],
    on_crashed=[notify_failure],
)
def most_generous_riders(
    source: Annotated[str, Field(min_length=1)] = f"{_PUBLIC}03.parquet",
    nrows: Annotated[int, Field(ge=1, le=10_000_000)] = 10_000,
    failure_rate: Annotated[float, Field(ge=0, le=1)] = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Find the rides with the largest share of the total paid as a tip.

    Args:
        source: One CSV or Parquet file of taxi rides: a path, or a file, s3 or http(s) URL. The column names of yellow
            and green files and of the sample are recognised; pickup times are ISO 8601 without an offset.
        nrows: Rows read from the start of the file, 1 to 10,000,000.
        failure_rate: Share of the cleaning attempts that fail on purpose, 0 to 1, to watch retries at work.
        seed: An integer that decides which attempts fail on purpose; the same seed, the same attempts.

    Returns:
        The summary: rides, hours, and the top rides (local times, US dollars, `ratio` is tip divided by total).
    """
    from flows.taxi import pages

    storage.keep_results()
    folder = storage.url(f"taxi/{runtime.flow_run.id}")
    rides = download(source, nrows, folder)
    hours = list(rides["chunks"])
    cleaning = clean.map(
        hours, list(rides["chunks"].values()), unmapped(folder), unmapped(failure_rate), unmapped(seed)
    )
    found = _results("best", best.map(hours, _results("clean", cleaning)))
    summary = publish_riders({**rides, "source": source, "best": [ride for ride in found if ride]}, folder)
    body = f"{pages.top_riders_list(summary)}\n\n{_link(str(runtime.flow_run.id))}"
    notify.send(get_run_logger(), pages.riders_headline(summary), body, "success")
    return summary


@task(persist_result=True, retries=2, retry_delay_seconds=10, retry_condition_fn=storage.retry_transient_errors)
def download(source: str, nrows: int, folder: str) -> dict[str, Any]:
    """Read the first rows and write one Parquet chunk per pickup hour; nothing when a row is invalid.

    Returns:
        `rides` read, those `without_pickup` time, and the URLs of the `chunks` by hour.
    """
    from flows.taxi import files, transform

    urls = files.matching(source)
    if len(urls) > 1:
        raise InputError(f"{source}: matches {len(urls)} files; specify one file")
    rides = files.first_rows(urls[0], transform.RIDE, nrows)
    if rides["pickup"].isna().all():
        raise InputError(f"{source}: no ride with a pickup time in its first {nrows:,} rows")
    chunks = dict(transform.by_hour(rides))
    with ThreadPoolExecutor(_WRITERS) as pool:
        written = pool.map(lambda hour: storage.put_frame(f"{folder}/hours/{hour}.parquet", chunks[hour]), chunks)
        return {
            "rides": len(rides),
            "without_pickup": int(rides["pickup"].isna().sum()),
            "chunks": dict(zip(chunks, written, strict=True)),
        }


@task(
    persist_result=True,
    retries=_CLEAN_RETRIES,
    retry_delay_seconds=2,
    retry_condition_fn=storage.retry_transient_errors,
    task_run_name="clean-{hour}",
)
def clean(hour: str, chunk: str, folder: str, failure_rate: float, seed: int) -> str:
    """Keep the rides of an hour that were paid with a tip.

    Returns:
        The URL of the cleaned chunk, which may be empty.
    """
    from flows.taxi import transform

    attempt = runtime.task_run.run_count
    if transform.fails_on_purpose(hour, attempt, last_attempt=_CLEAN_RETRIES + 1, rate=failure_rate, seed=seed):
        raise ConnectionError(f"hour {hour}: attempt {attempt} fails on purpose (failure_rate={failure_rate:g})")
    return storage.put_frame(f"{folder}/clean/{hour}.parquet", transform.paid_with_tip(storage.get_frame(chunk)))


@task(
    persist_result=True,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=storage.retry_transient_errors,
    task_run_name="best-{hour}",
)
def best(hour: str, chunk: str) -> dict[str, Any] | None:  # noqa: ARG001 - the hour names the task run
    """Find the most generous ride of an hour; None for an hour without any."""
    from flows.taxi import transform

    found = transform.records(transform.most_generous(storage.get_frame(chunk), count=1))
    return found[0] if found else None


@task
def publish_riders(found: dict[str, Any], folder: str) -> dict[str, Any]:
    """Rank the best rides of all hours, write the file, and publish table and page.

    Args:
        found: The result of `download`, `source`, and the `best` ride of each hour that has one.
        folder: URL of the run's folder.

    Returns:
        The flow's summary.
    """
    from flows.taxi import pages, transform

    top = transform.most_generous(transform.from_records(found["best"]), _TOP)
    url = storage.put_frame(f"{folder}/top_riders.parquet", top)
    hours = len(found["chunks"])
    summary = {
        "source": found["source"],
        "rides": found["rides"],
        "without_pickup": found["without_pickup"],
        "hours": hours,
        "hours_without_tip": hours - len(found["best"]),
        "top": transform.records(top),
    }
    headline = pages.riders_headline(summary)
    report.table("most-generous-riders-table", summary["top"], headline)
    report.page("most-generous-riders-report", pages.riders(summary, url), headline)
    report.outputs("most-generous-riders", [url])
    return summary


def _results(stage: str, futures: PrefectFutureList[Any]) -> list[Any]:
    """Collect the results of a mapped stage in order, with a progress bar; raise the first failure."""
    progress = report.Progress(f"most-generous-riders-{stage}", len(futures), f"Hours through `{stage}`")
    results = []
    for done, future in enumerate(futures, start=1):
        results.append(future.result())
        progress.update(done)
    return results


def _link(flow_run_id: str) -> str:
    return url_for("flow-run", obj_id=flow_run_id) or f"Flow run {flow_run_id}"

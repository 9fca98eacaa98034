"""csv-etl: add a number to every integer of a CSV. The smallest useful flow.

Produces: `csv_etl/<run id>/transformed.csv`, with the shape of the source.
Deployment: `csv-etl`, every 2 minutes (prefect.yaml).
Idempotent: a re-run writes the same file to the same place, and never overwrites a file that has other content. With
`update_source` it recognises that the source already holds the result, and does not add twice.
Runbook: docs/runbooks/csv-etl.md
"""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from pydantic import Field

from flows.csv_etl.transform import Row, increase, key, parse, preview, render
from tidepool import report, storage
from tidepool.errors import InputError, not_utf8

NAME = "csv-etl"


@flow(name=NAME, flow_run_name=report.run_name("add {increment} to {source}"), timeout_seconds=600)
def csv_etl(
    source: Annotated[str, Field(min_length=1)] = "samples/integers.csv",
    destination: Annotated[str, Field(min_length=1)] = "csv_etl/{run_id}/transformed.csv",
    increment: int = 1,
    update_source: bool = False,
) -> dict[str, Any]:
    """Add a number to every integer of a CSV.

    Args:
        source: CSV of integers: a path, or a file, s3 or http(s) URL. Lines may differ in length, and an empty file
            gives an empty result.
        destination: Key under the storage root, or file or s3 URL, of the result. {run_id} is the run's id. An
            existing file with other content is never overwritten.
        increment: Added to each integer; may be negative.
        update_source: Also write the result over the source. Off: the source is only read.

    Returns:
        `lines`, `integers`, `increment`, the `destination` as a URL, and whether the source was updated.

    Raises:
        InputError: a parameter or a cell of the source is invalid.
    """
    target = storage.url(key(destination, str(flow_run.id)))
    if update_source:
        _check_updatable(source, destination)

    rows = extract(source)
    if update_source and _is_written_back(source, target):
        rows = increase(rows, -increment)
    increased = transform(rows, increment)
    load(increased, target)
    if update_source:
        write_back(target, source)

    lines, integers = len(rows), sum(map(len, rows))
    result = f"{integers} integers in {lines} lines of {source}, each {increment:+d}"
    get_run_logger().info("%s: %s", result, target)
    report.table(f"{NAME}-lines", preview(rows, increased), result)
    report.outputs(NAME, [target])
    return {
        "lines": lines,
        "integers": integers,
        "increment": increment,
        "destination": target,
        "source_updated": update_source,
    }


# Not cached: a re-run must read the current content.
@task(
    retries=5,
    retry_delay_seconds=5,
    retry_condition_fn=storage.retry_transient_errors,
    cache_policy=NO_CACHE,
    task_run_name=report.task_name("extract {source}"),
)
def extract(source: str) -> list[Row]:
    """Read the integers of each line of the source."""
    try:
        return parse(storage.read(storage.source(source)).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: {not_utf8(error)}; expected a CSV of integers") from None
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


@task
def transform(rows: list[Row], increment: int) -> list[Row]:
    """Add the increment to each integer."""
    return increase(rows, increment)


@task(task_run_name=report.task_name("load {target}"))
def load(rows: list[Row], target: str) -> None:
    """Write the rows as CSV, unless a file with other content exists."""
    storage.create(target, render(rows).encode())


@task(task_run_name=report.task_name("write back to {source}"))
def write_back(target: str, source: str) -> None:
    """Overwrite the source with the result."""
    storage.write(storage.source(source), storage.read(target))


def _check_updatable(source: str, destination: str) -> None:
    if storage.source(source).startswith(("http://", "https://")):
        raise InputError(f"source: {source} cannot be written to; with update_source, use a path, or a file or s3 URL")
    if "{run_id}" not in destination:
        # The run's own result tells a re-run that the source is updated already.
        raise InputError(f"destination: {destination} lacks {{run_id}}, which update_source requires")


def _is_written_back(source: str, target: str) -> bool:
    """Tell whether an earlier attempt of this run has updated the source already."""
    return storage.exists(target) and storage.content_hash(storage.source(source)) == storage.content_hash(target)

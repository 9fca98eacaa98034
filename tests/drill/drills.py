"""The drills: each breaks a local stack, waits for what on-call sees, and repairs it by the commands of a runbook."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import httpx

from tests.drill.stack import POOL, TOP, Stack
from tests.polling import until
from tidepool.local.server import free_port

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Drill:
    """A drill.

    Attributes:
        text: What is broken, in a line.
        runbook: The runbook whose commands repair it.
        run: Breaks and repairs a stack.
    """

    text: str
    runbook: str
    run: Callable[[Stack], None]


DRILLS: dict[str, Drill] = {}


def drill(name: str, text: str, runbook: str) -> Callable[[Callable[[Stack], None]], Callable[[Stack], None]]:
    """Register a function as a drill."""

    def register(run: Callable[[Stack], None]) -> Callable[[Stack], None]:
        DRILLS[name] = Drill(text, runbook, run)
        return run

    return register


@drill("bad-input", "the source of csv-etl has a cell that is not an integer", "csv-etl")
def bad_input(stack: Stack) -> None:
    source = stack.folder / "integers.csv"
    source.write_text("1,2\n3,x7\n")
    stack.raise_tier("csv-etl")
    stack.configure("csv-etl", source=str(source))
    run = stack.fail("csv-etl")
    stack.alert("TidepoolRunsFailing", deployment="csv-etl")
    stack.cause(run)
    stack.status("failing")
    stack.diagnose("csv-etl", flow_run_id=run)
    source.write_text("1,2\n3,7\n")
    stack.say("repair", "the producer corrects the file")
    stack.mitigate("csv-etl", "Reproduce it", "The data is corrected", flow_run_id=run, source=str(source))
    stack.reaches(run, "COMPLETED")
    stack.message("Completed again: csv-etl/csv-etl")
    stack.green("TidepoolRunsFailing")


@drill("poisoned-item", "one frame of image-etl is an error page", "image-etl")
def poisoned_item(stack: Stack) -> None:
    frames = (TOP / "samples" / "image-data.img").read_bytes().split(b"\n\n\n\n")
    frames[3] = b"<html>503 Service Unavailable</html>"
    source = stack.folder / "poisoned.img"
    source.write_bytes(b"\n\n\n\n".join(frames))
    stack.raise_tier("image-etl")
    stack.configure("image-etl", data_url=str(source))
    run = stack.fail("image-etl")
    stack.alert("TidepoolRunsFailing", deployment="image-etl")
    stack.cause(run)
    stack.status("failing")
    stack.diagnose("image-etl", flow_run_id=run)
    stack.mitigate("image-etl", "Invalid frames")
    stack.message("Completed again: image-etl/image-etl")
    stack.green("TidepoolRunsFailing")


@drill("store-away", "the store of csv-etl does not answer", "run-failed")
def store_away(stack: Stack) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    secrets = {"AWS_ACCESS_KEY_ID": "drill", "AWS_SECRET_ACCESS_KEY": "drill", "AWS_DEFAULT_REGION": "us-east-1"}
    variables = {"TIDEPOOL_STORAGE_ROOT": "s3://drill", "AWS_ENDPOINT_URL": address, **secrets}
    stack.raise_tier("csv-etl")
    run = stack.fail("csv-etl", job_variables={"env": variables})
    stack.alert("TidepoolRunsFailing", deployment="csv-etl")
    stack.cause(run)
    stack.status("failing")
    stack.diagnose("run-failed", flow_run_id=run)
    stack.start("store", "moto.server", "-p", str(port))
    until(lambda: _has_bucket(address), seconds=120)
    stack.say("repair", "the store is back")
    stack.mitigate("run-failed", "transient error", flow_run_id=run)
    stack.reaches(run, "COMPLETED")
    stack.message("Completed again: csv-etl/csv-etl")
    stack.green("TidepoolRunsFailing")


def _has_bucket(store: str) -> bool:
    try:
        return httpx.put(f"{store}/drill").is_success
    except httpx.TransportError:
        return False


@drill("late-runs", "the work pool is paused, and three runs are late", "runs-late")
def late_runs(stack: Stack) -> None:
    stack.execute(f"prefect work-pool pause {POOL}")
    due = (datetime.now(UTC) - timedelta(minutes=11)).isoformat()
    scheduled = {"type": "SCHEDULED", "state_details": {"scheduled_time": due}}
    runs = [stack.create("csv-etl", state=scheduled) for _ in range(3)]
    stack.alert("TidepoolRunsLate", work_pool=POOL)
    stack.message("csv-etl is late")
    stack.status("late")
    stack.diagnose("runs-late")
    stack.mitigate("runs-late", "The pool is paused")
    # The runs of a deployment never overlap: the first one is executed, and the others are skipped while it runs.
    for run in runs:
        stack.reaches(run, "COMPLETED", "CANCELLED")
    stack.fixed("runs-late")
    stack.green("TidepoolRunsLate")


@drill("worker-silent", "the Prefect worker is killed", "work-pool-not-ready")
def worker_silent(stack: Stack) -> None:
    stack.kill_worker()
    stack.message(f"work pool {POOL} is not ready")
    stack.alert("TidepoolWorkerSilent", work_pool=POOL)
    stack.status("worker silent")
    stack.diagnose("work-pool-not-ready")
    stack.mitigate(
        "work-pool-not-ready", "It runs, but does not poll", instead={"component=worker": stack.start_worker}
    )
    stack.fixed("work-pool-not-ready")
    stack.green("TidepoolWorkerSilent")


@drill("drift", "a parameter of csv-etl is changed on the server", "drift-found")
def drift(stack: Stack) -> None:
    stack.configure("csv-etl", increment=5)
    _report_drift(stack)
    stack.message("drift: local: 1 differ")
    stack.status("drift")
    stack.diagnose("drift-found")
    stack.mitigate("drift-found", "It is not intended")
    stack.fixed("drift-found")
    _report_drift(stack)
    stack.green()


def _report_drift(stack: Stack) -> None:
    """Run drift-report, which the environment `local` has no deployment of."""
    stack.execute("python -c 'from flows.operations.flow import drift_report; drift_report(\"local\")'")


@drill("stale-data", "the source of weekly-forecast has no new weeks", "weekly-forecast")
def stale_data(stack: Stack) -> None:
    source = stack.folder / "series.csv"
    _write_weeks(stack, age=6)
    stack.configure(
        "weekly-forecast",
        source=str(source),
        max_age_weeks=2,
        models=["last-value"],
        horizon=4,
        windows=1,
    )
    run = stack.fail("weekly-forecast")
    stack.alert("TidepoolRunsFailing", deployment="weekly-forecast")
    stack.cause(run)
    stack.status("failing")
    stack.diagnose("weekly-forecast", flow_run_id=run)
    _write_weeks(stack, age=0)
    stack.say("repair", "the producer writes the missing weeks")
    stack.mitigate("weekly-forecast", "Stale data")
    stack.message("Completed again: weekly-forecast/weekly-forecast")
    stack.green("TidepoolRunsFailing")


def _write_weeks(stack: Stack, age: int) -> None:
    """Write three years of a weekly series that ended so many weeks ago."""
    last = datetime.now(UTC).date() - timedelta(weeks=age)
    rows = [f"{last - timedelta(weeks=back)},{100 + back % 52}" for back in range(156, -1, -1)]
    (stack.folder / "series.csv").write_text("\n".join(["date,co2", *rows, ""]))


@drill("crashed-driver", "the process of three runs is killed", "crash-loop")
def crashed_driver(stack: Stack) -> None:
    # Long enough to be killed in the middle.
    stack.configure("most-generous-riders", nrows=10, failure_rate=0.9)
    run, *_ = [stack.drive("most-generous-riders") for _ in range(3)]
    stack.message("most-generous-riders crashes again and again")
    stack.alert("TidepoolRunsCrashing")
    stack.alert("TidepoolRunsFailing", deployment="most-generous-riders")
    stack.cause(run)
    stack.status("failing")
    names = {"flow": "most-generous-riders", "deployment": "most-generous-riders"}
    stack.diagnose("crash-loop", flow_run_id=run, **names)
    stack.mitigate("crash-loop", "Stop it", **names)
    stack.configure("most-generous-riders", failure_rate=0)
    stack.say("repair", "nothing kills it any more")
    stack.mitigate("crash-loop", "Repaired", **names)
    stack.message("Completed again: most-generous-riders/most-generous-riders")
    # TidepoolRunsCrashing ends five minutes after the last crash.
    stack.green("TidepoolRunsFailing")


@drill("stuck-cancelling", "a run is cancelled whose process is gone", "run-stuck-cancelling")
def stuck_cancelling(stack: Stack) -> None:
    run = stack.create("csv-etl", state={"type": "PENDING"})
    stack.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "RUNNING"}})
    with stack.within("run-stuck-cancelling", 10):
        stack.execute(f"prefect flow-run cancel {run}")
        stack.message("csv-etl is still Cancelling")
    stack.age(run, minutes=11)
    stack.alert("TidepoolRunStuck", deployment="csv-etl", state="Cancelling")
    stack.status("stuck")
    stack.diagnose("run-stuck-cancelling", flow_run_id=run)
    stack.mitigate("run-stuck-cancelling", "No Job and no pod", flow_run_id=run)
    stack.reaches(run, "CANCELLED")
    stack.green("TidepoolRunStuck")


@drill("scheduler-stopped", "Prefect's scheduler does not run", "TidepoolSchedulerStopped")
def scheduler_stopped(stack: Stack) -> None:
    stack.start_server(PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED="false")
    stack.execute("tidepool resume csv-etl")
    stack.start_exporter()  # it reads schedules every five minutes
    stack.alert("TidepoolSchedulerStopped")
    stack.status("scheduler")
    stack.diagnose("TidepoolSchedulerStopped")
    stack.mitigate(
        "TidepoolSchedulerStopped",
        "Restart the services",
        instead={"component=services": stack.start_server},
    )
    until(lambda: "csv-etl" in stack.execute("prefect flow-run ls --state Scheduled"), seconds=120)
    stack.fixed("TidepoolSchedulerStopped")
    stack.green("TidepoolSchedulerStopped")

"""What Dask is given to call: functions that cost its scheduler nothing to import.

The scheduler unpickles every graph that it receives, functions by reference, before it sends the tasks on. `worker.run`
itself would have it import Prefect: about a second in which no task runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distributed import get_worker
from distributed.utils import sync

if TYPE_CHECKING:
    from tidepool.compute.futures import Outcome

# The driver learns here that a task run, which has lost a worker before, has begun again.
STARTED_TOPIC = "tidepool-started"


def run(
    call: list[str], context: list[str], payload: bytes, again: tuple[str, int] | None, upstreams: list[Outcome]
) -> Outcome:
    """Runs one task in a worker: `tidepool.compute.worker.run`.

    Args:
        call: As there.
        context: As there.
        payload: As there.
        again: Of a task run that has lost a worker before: its id, and how often it was sent again.
        upstreams: As there.
    """
    if again:
        # Before anything of the flow's is imported or read: that too may end this process.
        _report_start(*again)
    from tidepool.compute import worker

    return worker.run(call, context, payload, upstreams)


def forget(name: str, dask_scheduler: Any) -> None:  # noqa: ANN401 - a Scheduler, which has no types
    """Takes what a flow run has published from the scheduler; `Client.run_on_scheduler` calls it."""
    dask_scheduler.task_metadata.pop(name, None)


def _report_start(task_run_id: str, attempt: int) -> None:
    worker = get_worker()
    # With an answer, unlike Worker.log_event: the task may end this process at once.
    sync(
        worker.loop,
        worker.scheduler.log_event,
        topic=STARTED_TOPIC,
        msg={"task_run_id": task_run_id, "attempt": attempt},
    )

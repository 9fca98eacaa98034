"""Functions that Dask calls: its scheduler imports them at no cost.

The scheduler unpickles every graph that it receives, functions by reference, before it sends the tasks on. With
`engine.run` in it, it would import Prefect: about a second in which no task runs.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from distributed import get_worker
from distributed.utils import sync

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidepool.compute.worker.outcome import Outcome

# Topic on which a worker reports that a task run has begun which has lost a worker before.
STARTED_TOPIC = "tidepool-started"


def run(pickled: bytes, upstreams: Sequence[Outcome] = ()) -> Outcome:
    """Run one task in a worker by `tidepool.compute.worker.engine.run`.

    Args:
        pickled: The first three arguments of `engine.run`, and, of a task run that has lost a worker before, its id and
            the number of the attempt.
        upstreams: Final states that the payload refers to.
    """
    call, context, payload, again = pickle.loads(pickled)  # noqa: S301 - the driver's own
    if again:
        # Before anything of the flow is imported or read: that too may end this process.
        _report_start(*again)
    from tidepool.compute.worker import engine

    return engine.run(call, context, payload, upstreams)


def forget(name: str, dask_scheduler: Any) -> None:
    """Remove what a flow run has published on the scheduler; `Client.run_on_scheduler` calls it."""
    dask_scheduler.task_metadata.pop(name, None)


def _report_start(task_run_id: str, attempt: int) -> None:
    worker = get_worker()
    # It waits for the answer, unlike Worker.log_event: the task may end this process at once.
    sync(
        worker.loop,
        worker.scheduler.log_event,
        topic=STARTED_TOPIC,
        msg={"task_run_id": task_run_id, "attempt": attempt},
    )

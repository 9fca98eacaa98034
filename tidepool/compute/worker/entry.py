"""Functions that Dask calls: its scheduler imports them at no cost.

The scheduler unpickles every graph that it receives, functions by reference, before it sends the tasks on. With
`engine.run` in it, it would import Prefect: about a second in which no task runs.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed import get_worker
from distributed.utils import sync

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidepool.compute.worker.outcome import Outcome

# Topic on which a worker reports that a task run has begun which has lost a worker before.
STARTED_TOPIC = "tidepool-started"


class Sending(NamedTuple):
    """Everything that a task run needs, except its upstreams.

    Attributes:
        call: Metadata path of the pickled `engine.Call` on the scheduler.
        context: Metadata path of the pickled Prefect context.
        payload: A pickled `engine.Payload`.
        again: Id and number of the attempt, of a task run that has lost a worker before.
    """

    call: list[str]
    context: list[str]
    payload: bytes
    again: tuple[str, int] | None


def run(pickled: bytes, upstreams: Sequence[Outcome] = ()) -> Outcome:
    """Run one task in a worker by `tidepool.compute.worker.engine.run`.

    Args:
        pickled: A `Sending`.
        upstreams: Final states that the payload refers to.
    """
    sending: Sending = pickle.loads(pickled)  # noqa: S301 - the driver's own
    if sending.again:
        # Before anything of the flow is imported or read: that too may end this process.
        _report_start(*sending.again)
    from tidepool.compute.worker import engine

    return engine.run(sending.call, sending.context, sending.payload, upstreams)


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

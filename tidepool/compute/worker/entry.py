"""What Dask is given to call: functions that cost its scheduler nothing to import.

The scheduler unpickles every graph that it receives, functions by reference, before it sends the tasks on. `engine.run`
itself would have it import Prefect: about a second in which no task runs.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed import get_worker
from distributed.utils import sync

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidepool.compute.runner.futures import Outcome

# The driver learns here that a task run, which has lost a worker before, has begun again.
STARTED_TOPIC = "tidepool-started"


class Sending(NamedTuple):
    """What a task run needs, but for its upstreams.

    Attributes:
        call: Where the scheduler keeps the pickled `engine.Call`.
        context: Where it keeps the pickled Prefect context.
        payload: A pickled `engine.Payload`.
        again: Of a task run that has lost a worker before: its id, and how often it was sent again.
    """

    call: list[str]
    context: list[str]
    payload: bytes
    again: tuple[str, int] | None


def run(pickled: bytes, upstreams: Sequence[Outcome] = ()) -> Outcome:
    """Runs one task in a worker: `tidepool.compute.worker.engine.run`.

    Args:
        pickled: A `Sending`.
        upstreams: Final states that the payload refers to.
    """
    sending: Sending = pickle.loads(pickled)  # noqa: S301 - the driver's own
    if sending.again:
        # Before anything of the flow's is imported or read: that too may end this process.
        _report_start(*sending.again)
    from tidepool.compute.worker import engine

    return engine.run(sending.call, sending.context, sending.payload, upstreams)


def forget(name: str, dask_scheduler: Any) -> None:
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

"""Functions that Dask calls: its scheduler imports them at no cost.

The scheduler unpickles every graph that it receives, functions by reference, before it sends the tasks on. With
`engine.run` in it, it would import Prefect: about a second in which no task runs.
"""

from __future__ import annotations

import logging
import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

from distributed import get_worker
from distributed.utils import sync

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidepool.compute.worker.outcome import Outcome

# Topic on which a worker reports that a task run has begun which has lost a worker before.
STARTED_TOPIC = "tidepool-started"
_TRIES = 4
_log = logging.getLogger(__name__)


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


def ask_scheduler(call: str, **arguments: Any) -> Any:
    """Return the scheduler's answer to a call of a task.

    On a node that is busy with starts, it may not accept a connection within the 30 s of Dask's
    `distributed.comm.timeouts.connect`: no reason for a task to fail.

    Args:
        call: Name of the scheduler's function.
        arguments: Its arguments.

    Raises:
        OSError: no connection at four tries.
    """
    worker = get_worker()
    ask = partial(sync, worker.loop, getattr(worker.scheduler, call), **arguments)
    for _ in range(_TRIES - 1):
        try:
            return ask()
        except OSError as error:
            _log.warning("the Dask scheduler is asked again: %s", error)
    return ask()


def _report_start(task_run_id: str, attempt: int) -> None:
    # It waits for the answer, unlike Worker.log_event: the task may end this process at once.
    ask_scheduler("log_event", topic=STARTED_TOPIC, msg={"task_run_id": task_run_id, "attempt": attempt})

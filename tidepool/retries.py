"""Which failures of a task are worth another try: values for `@task(retry_condition_fn=…)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidepool import storage

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun


def on_io_errors(_task: Task[..., Any], _task_run: TaskRun, state: State[Any]) -> bool:
    """Retries what the network or a store may not do again; what is wrong with the data will be wrong again."""
    return storage.is_transient(state.data)

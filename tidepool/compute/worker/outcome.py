"""The final state of a task run, as a worker sends it to the driver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cloudpickle
from prefect.client.schemas.objects import State, StateDetails

if TYPE_CHECKING:
    from datetime import datetime

    from prefect.client.schemas.objects import TaskRun


@dataclass(frozen=True, slots=True)
class Outcome:
    """A final state as it came from the worker, in little memory: a driver keeps ten thousand of them.

    Attributes:
        header: The state without its data and without what is default, pickled.
        data: The state's data (result or exception), pickled apart: reading it may fail, and takes time. Empty if the
            outcome is kept without it.
        name: The task run's name; None if no worker ran it.
        start_time: When it began to run, if it did.
        worker: Address of the Dask worker that ran it.
    """

    header: bytes
    data: bytes
    name: str | None = None
    start_time: datetime | None = None
    worker: str | None = None

    @classmethod
    def of(cls, state: State[Any], run: TaskRun | None = None, worker: str | None = None) -> Outcome:
        """Return the outcome with that state, of a task run as the worker at that address knows it."""
        details = state.state_details.model_dump(exclude_defaults=True)
        header = cloudpickle.dumps((state.type.value, state.name, state.message, state.id, state.timestamp, details))
        data = cloudpickle.dumps(state.data)
        return cls(header, data) if run is None else cls(header, data, run.name, run.start_time, worker)

    def state(self) -> State[Any]:
        """Return the final state."""
        kind, name, message, state_id, timestamp, details = cloudpickle.loads(self.header)
        return State(
            type=kind,
            name=name,
            message=message,
            id=state_id,
            timestamp=timestamp,
            state_details=StateDetails(**details),
            data=cloudpickle.loads(self.data) if self.data else None,
        )

    def without_data(self) -> Outcome:
        """Return the same outcome without the state's data."""
        return replace(self, data=b"")

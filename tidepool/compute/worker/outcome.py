"""The final state of a task run, as a worker sends it to the driver."""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cloudpickle
from prefect.client.schemas.objects import State, StateDetails

if TYPE_CHECKING:
    from datetime import datetime

    from prefect.client.schemas.objects import TaskRun

# Larger results are unlike others, and compressing them takes time.
_PACKED_BYTES = 4096


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
        seconds: Duration from then to its end.
        tries: How often it began to run.
        failed: It did not complete.
        like: The dictionary with which header and data are compressed: those of another outcome. Empty if they are not.
    """

    header: bytes
    data: bytes
    name: str | None = None
    start_time: datetime | None = None
    worker: str | None = None
    seconds: float = 0.0
    tries: int = 0
    failed: bool = False
    like: bytes = b""

    @classmethod
    def of(cls, state: State[Any], run: TaskRun | None = None, worker: str | None = None) -> Outcome:
        """Return the outcome with that state, of a task run as the worker at that address knows it."""
        details = state.state_details.model_dump(exclude_defaults=True)
        header = cloudpickle.dumps((state.type.value, state.name, state.message, state.id, state.timestamp, details))
        data = cloudpickle.dumps(state.data)
        failed = not state.is_completed()
        if run is None:
            return cls(header, data, failed=failed)
        seconds = (state.timestamp - run.start_time).total_seconds() if run.start_time else 0.0
        return cls(header, data, run.name, run.start_time, worker, seconds, run.run_count, failed)

    def state(self) -> State[Any]:
        """Return the final state."""
        kind, name, message, state_id, timestamp, details = cloudpickle.loads(self._unpacked(self.header))
        return State(
            type=kind,
            name=name,
            message=message,
            id=state_id,
            timestamp=timestamp,
            state_details=StateDetails(**details),
            data=cloudpickle.loads(self._unpacked(self.data)) if self.data else None,
        )

    def without_data(self) -> Outcome:
        """Return the same outcome without the state's data."""
        return replace(self, data=b"")

    @property
    def common(self) -> bytes:
        """The part that other outcomes probably share with this one; empty for a large one, which all would keep."""
        return b"" if self.like or len(self.header) + len(self.data) > _PACKED_BYTES else self.header + self.data

    def packed(self, like: bytes) -> Outcome:
        """Return the same outcome without what it has in common with `like`: about a tenth of the bytes."""
        if not like or not self.common:
            return self
        header, data = (_compressed(each, like) if each else b"" for each in (self.header, self.data))
        return replace(self, header=header, data=data, worker=self.worker and sys.intern(self.worker), like=like)

    def _unpacked(self, packed: bytes) -> bytes:
        return zlib.decompressobj(zdict=self.like).decompress(packed) if self.like else packed


def _compressed(pickled: bytes, like: bytes) -> bytes:
    packer = zlib.compressobj(level=1, zdict=like)
    return packer.compress(pickled) + packer.flush()

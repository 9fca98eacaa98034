"""What Dask is given to call: a function that costs its scheduler nothing to import.

The scheduler unpickles every graph that it receives, functions by reference, before it sends the tasks on. `worker.run`
itself would have it import Prefect: about a second in which no task runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidepool.compute.futures import Outcome


def run(call: list[str], context: list[str], payload: bytes, attempt: int, upstreams: list[Outcome]) -> Outcome:
    """Runs one task in a worker: `tidepool.compute.worker.run`."""
    from tidepool.compute import worker

    return worker.run(call, context, payload, attempt, upstreams)

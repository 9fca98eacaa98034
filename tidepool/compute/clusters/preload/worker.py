"""Dask preload of a worker on Kubernetes: `dask worker --preload tidepool.compute.clusters.preload.worker`.

The imports are its purpose: they happen while the scheduler starts, and a worker joins the cluster only when it can run
a Prefect task at once. Not in a thread: two threads that import the same packages may each see the other's half.
"""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING

import tidepool.compute.worker.engine  # noqa: F401 - what runs the tasks, with Prefect
from tidepool.compute.worker.breakpoints import refuse_breakpoints

if TYPE_CHECKING:
    from distributed import Worker


def figures(_worker: Worker) -> dict[str, float]:
    """Return this process's peak memory (bytes) and CPU time (seconds) until now, for each heartbeat."""
    return {
        "memory_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cpu_seconds": time.process_time(),
    }


def dask_setup(worker: Worker) -> None:
    """Extend the worker before it joins the scheduler."""
    refuse_breakpoints()
    worker.metrics["tidepool"] = figures

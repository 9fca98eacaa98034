"""Dask preload of a worker on Kubernetes: `dask worker --preload tidepool.compute.clusters.preload.worker`.

The imports are the point: they happen while the scheduler starts, and a worker is in the cluster only when it can run a
Prefect task at once. Not in a thread: two threads importing the same packages may each see the other's half.
"""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING

import tidepool.compute.worker.engine  # noqa: F401 - what runs the tasks, with Prefect
from tidepool.compute.clusters.preload.versions import versions

if TYPE_CHECKING:
    from distributed import Worker

VERSIONS = "tidepool_versions"


def figures(_worker: Worker) -> dict[str, float]:
    """What this process used until now, sent with each heartbeat: peak memory (bytes) and CPU time (seconds)."""
    return {
        "memory_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cpu_seconds": time.process_time(),
    }


def dask_setup(worker: Worker) -> None:
    """Called by `dask worker` before it joins the scheduler."""
    worker.metrics["tidepool"] = figures
    worker.handlers[VERSIONS] = versions

"""Dask clusters on this machine."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import dask.config
import distributed

from tidepool.compute.run_log import run_log
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidepool.settings import SizeSettings


@cache
def set_dask_defaults(no_worker_seconds: float) -> None:
    """Set the defaults of this process for Dask clusters that run mapped tasks.

    A user's own configuration (`DASK_DISTRIBUTED__…`, YAML) takes precedence.

    Args:
        no_worker_seconds: How long a cluster may be without any worker.
    """
    patience = f"{no_worker_seconds:g}s"
    dask.config.update_defaults(
        {
            "distributed": {
                "scheduler": {"no-workers-timeout": patience},
                # Dask removes the nanny of a worker that is not back within 15 s. On a busy machine, or when a task
                # kills its worker twice in a row, none was left, and the flow run waited for a cluster without workers.
                "deploy": {"lost-worker-timeout": patience},
                # Dask samples the stack of each running task every 10 ms. Prefect's is deep: a tenth of a worker's CPU.
                "worker": {"profile": {"enabled": False}},
                # Dask keeps the last 1,000 messages to each peer, with the tasks in them, for debugging.
                "admin": {"low-level-log-length": 100},
            }
        }
    )


def local_cluster(size: SizeSettings, *, processes: bool = True, **options: Any) -> distributed.LocalCluster:
    """Start a Dask cluster of that size on this machine; no more worker processes than cores.

    Args:
        size: Workers, threads each, and memory limit each (GiB).
        processes: Whether workers are processes (a crash loses one worker) or threads of this process.
        options: Passed on to `distributed.LocalCluster`.
    """
    workers = min(size.workers, os.cpu_count() or 1) if processes else size.workers
    set_dask_defaults(settings().compute.no_worker_seconds)
    return distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=size.threads,
        memory_limit=f"{size.memory_gib}GiB" if processes else None,
        processes=processes,
        # Reachable from this machine only (threads need no address), on any free port: several runs at a time.
        host="127.0.0.1" if processes else None,
        dashboard_address="127.0.0.1:0",
        **options,
    )


@contextmanager
def cluster(size: SizeSettings, *, processes: bool) -> Iterator[distributed.LocalCluster]:
    """Start a local cluster for the time of the block; log its start and its end."""
    with local_cluster(size, processes=processes) as started:
        run_log().info(
            "Dask cluster %s: %s workers at %s", started.name, len(started.workers), started.scheduler_address
        )
        try:
            yield started
        finally:
            run_log().info("Dask cluster %s: closing", started.name)
    run_log().info("Dask cluster %s: closed", started.name)

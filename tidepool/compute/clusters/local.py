"""Dask clusters on this machine."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import dask.config
import distributed

from tidepool.compute.run_log import run_log
from tidepool.settings import settings
from tidepool.upstream.distributed import start_workers_without_main

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
                # A daemonic process may not have children: no process pool and no Dask cluster in a mapped task.
                # Dask's workers end with their nanny's process in any case, by a pipe to it.
                "worker": {"profile": {"enabled": False}, "daemon": False},
                # Dask keeps the last 1,000 messages to each peer, with the tasks in them, for debugging.
                "admin": {"low-level-log-length": 100},
            }
        }
    )


def quiet_dask() -> None:
    """Have this process log Dask's lines from WARNING on, unless the user has configured Dask's logging.

    Where Prefect has set up logging before Dask was imported, Dask leaves its lines to Prefect's handler, which prints
    each INFO of a scheduler on the terminal; `silence_logs` of a cluster concerns Dask's own handler only.
    """
    if dask.config.get("logging", None) is None:
        logging.getLogger("distributed").setLevel(logging.WARNING)


def local_cluster(size: SizeSettings, *, processes: bool = True, **options: Any) -> distributed.LocalCluster:
    """Start a Dask cluster of that size on this machine; no more worker processes than cores.

    Args:
        size: Workers, threads each, and memory limit each (GiB).
        processes: Whether workers are processes (a crash loses one worker) or threads of this process.
        options: Passed on to `distributed.LocalCluster`.
    """
    workers = min(size.workers, os.cpu_count() or 1) if processes else size.workers
    set_dask_defaults(settings().compute.no_worker_seconds)
    quiet_dask()
    if processes:
        start_workers_without_main()
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

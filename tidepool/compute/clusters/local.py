"""Dask clusters on this machine."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dask.config
import distributed

from tidepool.compute.run_log import run_log
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidepool.settings import SizeSettings


class PatientCluster(distributed.LocalCluster):
    """A local cluster that does not give up a worker which takes long to come back.

    Dask's own takes a worker's nanny away for good when the worker is not back within 15 s. On a busy machine, or when
    a task kills its worker twice in a row, none was left: the flow run waited for a cluster without workers.
    """

    def _update_worker_status(self, op: str, msg: Any) -> None:
        # Dask reads the setting in here; for how long no worker at all is borne, the scheduler knows.
        with dask.config.set({"distributed.deploy.lost-worker-timeout": f"{settings().compute.no_worker_seconds}s"}):
            super()._update_worker_status(op, msg)  # type: ignore[no-untyped-call] # distributed leaves it unannotated


def local_cluster(size: SizeSettings, *, processes: bool = True, **options: Any) -> distributed.LocalCluster:
    """A Dask cluster of that size on this machine; no more worker processes than cores.

    Args:
        size: Workers, threads each, and memory limit each (GiB).
        processes: Workers are processes (a crash loses one worker) or threads of this process.
        options: Passed on to `distributed.LocalCluster`.
    """
    workers = min(size.workers, os.cpu_count() or 1) if processes else size.workers
    return PatientCluster(  # type: ignore[no-untyped-call] # distributed leaves it unannotated
        n_workers=workers,
        threads_per_worker=size.threads,
        memory_limit=f"{size.memory_gib}GiB" if processes else None,
        processes=processes,
        # Only this machine can see it (threads need no address), and any free port: several runs go on at a time.
        host="127.0.0.1" if processes else None,
        dashboard_address="127.0.0.1:0",
        **options,
    )


@contextmanager
def cluster(size: SizeSettings, *, processes: bool) -> Iterator[distributed.LocalCluster]:
    """A local cluster for the time of the block; its start and its end are in the log."""
    with local_cluster(size, processes=processes) as started:
        run_log().info(
            "Dask cluster %s: %s workers at %s", started.name, len(started.workers), started.scheduler_address
        )
        try:
            yield started
        finally:
            run_log().info("Dask cluster %s: closing", started.name)
    run_log().info("Dask cluster %s: closed", started.name)


@contextmanager
def client(to: distributed.deploy.cluster.Cluster) -> Iterator[distributed.Client]:
    """A client of a cluster, the default one of this thread inside the block."""
    with distributed.Client(to, set_as_default=False) as connected, connected.as_current():
        yield connected


@contextmanager
def existing(address: str) -> Iterator[distributed.Client]:
    """A client of a scheduler that runs already, and goes on afterwards."""
    with distributed.Client(address, set_as_default=False) as connected, connected.as_current():
        run_log().info("Dask cluster at %s: connected", address)
        yield connected

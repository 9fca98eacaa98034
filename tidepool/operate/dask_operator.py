"""The Dask operator as tidepool runs it: `kopf run --module=tidepool.operate.dask_operator --namespace=…`.

It is dask-kubernetes' own controller. The changes here let it run with a Role instead of a ClusterRole, have it refuse
what flow runs may not have, and have a deleted Dask cluster go at once and completely.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import kopf

from tidepool.operate import allocation, idle_clusters, log_lines, refusals, schedulers
from tidepool.operate.metrics import OPERATOR, Metrics
from tidepool.operate.sweep import flow_run_loop
from tidepool.operate.sweep import loop as sweep
from tidepool.operate.sweep.dask_workers import DaskWorkers
from tidepool.operate.sweep.figures import SweepFigures
from tidepool.settings import settings as tidepool_settings
from tidepool.upstream import dask_kubernetes
from tidepool.upstream import kopf as kopf_internals

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer


@kopf.on.startup()
async def prepare(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    """Change the controller before it handles the first DaskCluster."""
    # By default kopf lists the namespaces and custom resource definitions of the whole cluster first. Forbidden by a
    # Role, it tries nine times in 54 seconds, in which it answers its liveness probe and ignores every DaskCluster.
    settings.scanning.disabled = True
    # A DaskAutoscaler that is deleted while its timer asks the scheduler keeps its finalizer until kopf checks again:
    # by default a minute later.
    settings.background.cancellation_polling = 1.0
    dask_kubernetes.own_worker_groups()
    dask_kubernetes.ask_schedulers_by(schedulers.desired_workers, schedulers.retire_workers)
    # `idle_clusters.watch` does its work. For a timer kopf gives each DaskCluster a finalizer: the deletion waits until
    # the timer has ended, which asks a scheduler that is gone (53 to 85 seconds, measured), and without an operator
    # forever. And the timer of a cluster that is deleted before it has the finalizer never ends.
    kopf_internals.remove_timer(kopf.get_default_registry(), dask_kubernetes.IDLE_TIMER)
    # Work without an effect, by the number of workers: docs/scaling.md.
    kopf_internals.remove_handlers(kopf.get_default_registry(), *dask_kubernetes.JOB_PODS)
    kopf_internals.not_at_creation(kopf.get_default_registry(), dask_kubernetes.SCALE_WORKERS)
    # After the last change of the handlers: nothing is made of an object that a flow run may not have.
    kopf_internals.check_first(kopf.get_default_registry(), refusals.check)
    for noisy in ("httpx", "aiohttp.access", "kopf.activities.probe"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    log_lines.install()
    operator = tidepool_settings().operator
    namespaces, pools = operator.namespaces.split(), operator.work_pools.split()
    exchange, metrics = sweep.Exchange(), Metrics(OPERATOR)
    workers = DaskWorkers(datetime.now(UTC))
    memo.metrics = _serve(metrics, operator.metrics_port) if operator.metrics_port else None
    sweeping = sweep.watch(namespaces, exchange, SweepFigures(metrics, namespaces))
    memo.loops = [
        asyncio.create_task(idle_clusters.watch(namespaces), name="watch over idle clusters"),
        asyncio.create_task(sweeping, name="sweep of what runs leave behind"),
        asyncio.create_task(allocation.watch(namespaces, metrics, workers), name="count of what runs have requested"),
    ]
    if pools:
        watch = flow_run_loop.watch(namespaces, pools, exchange, workers)
        memo.loops.append(asyncio.create_task(watch, name="watch over flow runs"))
    for each in memo.loops:
        each.add_done_callback(_stop_operator)


@kopf.on.cleanup()
async def end(memo: kopf.Memo, **_: Any) -> None:
    """End what `prepare` has begun."""
    for each in memo.loops:
        each.cancel()
    if memo.metrics:
        memo.metrics.shutdown()
        memo.metrics.server_close()


def _serve(metrics: Metrics, port: int) -> WSGIServer:
    """Serve the operator's metrics to Prometheus."""
    from prometheus_client import start_http_server

    server, _ = start_http_server(port, registry=metrics.registry)
    return server


def _stop_operator(loop: asyncio.Task[None]) -> None:
    """Stop the operator, which would keep clusters without its loops; Kubernetes restarts it."""
    if not loop.cancelled():
        logging.getLogger(__name__).critical("the %s has ended", loop.get_name(), exc_info=loop.exception())
        signal.raise_signal(signal.SIGTERM)

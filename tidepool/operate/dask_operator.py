"""The Dask operator as tidepool runs it: `kopf run --module=tidepool.operate.dask_operator --namespace=…`.

It is dask-kubernetes' own controller. What is changed here lets it live with a Role instead of a ClusterRole, and
lets a Dask cluster go at once and whole when it is removed.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

import kopf
from dask_kubernetes.operator.controller import controller  # registers the handlers of DaskCluster and its parts

from tidepool.operate import idle_clusters
from tidepool.settings import settings as tidepool_settings

_build_default_worker_group_spec = controller.build_default_worker_group_spec


@kopf.on.startup()
async def prepare(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    """Changes what has to be, before the first DaskCluster is looked at."""
    # By default kopf lists the namespaces and custom resource definitions of the whole cluster first. Forbidden by a
    # Role, it tries nine times in 54 seconds, in which it answers its liveness probe and ignores every DaskCluster.
    settings.scanning.disabled = True
    # A DaskAutoscaler that is removed while its timer asks the scheduler keeps its finalizer until kopf looks again: by
    # default a minute later.
    settings.background.cancellation_polling = 1.0
    controller.build_default_worker_group_spec = _owned_worker_group
    remove_idle_timers(kopf.get_default_registry())
    for noisy in ("httpx", "aiohttp.access", "kopf.activities.probe"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    memo.idle_clusters = asyncio.create_task(idle_clusters.watch(tidepool_settings().kubernetes.namespace))
    memo.idle_clusters.add_done_callback(_end_with)


@kopf.on.cleanup()
async def end(memo: kopf.Memo, **_: Any) -> None:
    """Ends what `prepare` has begun."""
    memo.idle_clusters.cancel()


def _end_with(watch: asyncio.Task[None]) -> None:
    """Without its watch the operator would leave idle clusters for ever: it ends, and Kubernetes starts it again."""
    if not watch.cancelled():
        logging.getLogger(__name__).critical("the watch over idle clusters has ended", exc_info=watch.exception())
        signal.raise_signal(signal.SIGTERM)


def remove_idle_timers(registry: kopf.OperatorRegistry) -> None:
    """Takes out the controller's timer for idle clusters; `idle_clusters.watch` does its work.

    For a timer kopf gives each DaskCluster a finalizer: the removal waits until the timer has ended, which asks a
    scheduler that is gone (53 to 85 seconds, measured), and without an operator for ever. And the timer of a cluster
    that is removed before it has the finalizer never ends.
    """
    spawning = registry._spawning  # noqa: SLF001 - no public way; tests/contract/test_operator_internals.py
    spawning._handlers = [  # noqa: SLF001
        each
        for each in spawning._handlers  # noqa: SLF001
        if each.fn is not controller.daskcluster_autoshutdown
    ]


def _owned_worker_group(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Upstream's worker group, with its owner from the beginning.

    Upstream adds the owner when it sees the group. The group of a cluster that was removed by then stays for ever.
    """
    group: dict[str, Any] = _build_default_worker_group_spec(*args, **kwargs)
    kopf.adopt(group)
    return group

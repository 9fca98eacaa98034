"""Core-seconds and GiB-seconds of the pods of flow runs, and their price: a loop of the operator.

The pods are listed every ten seconds. A pod counts from its start to the last time that it was seen running: one that
was killed counts too, and the last ten seconds of a pod, at most, do not. Pods that were running when the operator
started count from then on, because the operator before it counted them.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tidepool.compute.clusters.kubernetes.names import LABEL_CLUSTER, LABEL_RUN
from tidepool.operate.rules import quantity
from tidepool.operate.sweep.drivers import LABEL_FLOW_RUN
from tidepool.operate.sweep.loop import Problems
from tidepool.operate.sweep.observation import DRIVERS, connect, pods_with
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidepool.operate.metrics import Metrics
    from tidepool.operate.sweep.dask_workers import DaskWorkers
    from tidepool.operate.sweep.observation import Object

_POLL_SECONDS = 10.0
_GIB = 2**30
_HOUR = 3600
# Of pods whose run has no driver here, and of those of a shared cluster.
_OTHER = ("other", "other")


async def watch(namespaces: Sequence[str], metrics: Metrics, workers: DaskWorkers) -> None:
    """Count what the pods of the namespaces have requested, until cancelled.

    Args:
        namespaces: All namespaces of flow runs.
        metrics: The operator's metrics.
        workers: Is shown the pods, too.
    """
    problems, api = Problems(), None
    allocations = {each: Allocation(each, metrics, datetime.now(UTC)) for each in namespaces}
    while True:
        for namespace, allocation in allocations.items():
            with problems.of(f"resources of namespace {namespace}"):
                api = api or await connect()
                # Drivers first: a Dask pod that is listed then has its driver in one of the two lists.
                drivers = await pods_with(api, namespace, DRIVERS)
                dask_pods = await pods_with(api, namespace, LABEL_CLUSTER)
                allocation.count(drivers, dask_pods, datetime.now(UTC))
                workers.see_pods(drivers, dask_pods, datetime.now(UTC))
        await asyncio.sleep(_POLL_SECONDS)


class Allocation:
    """The resources that the pods of one namespace have requested so far.

    Args:
        namespace: Its name.
        metrics: The operator's metrics.
        since: The operator's start.
    """

    def __init__(self, namespace: str, metrics: Metrics, since: datetime) -> None:
        operator = settings().operator
        self._namespace = namespace
        self._metrics = metrics
        self._since = since
        self._prices = operator.core_hour_price, operator.gib_hour_price
        self._counted: dict[str, datetime] = {}  # by uid, until when
        self._deployments: dict[str, tuple[str, str]] = {}  # by flow run

    def count(self, drivers: Iterable[Object], dask_pods: Iterable[Object], now: datetime) -> None:
        """Count what all running pods have requested until now.

        Args:
            drivers: The drivers.
            dask_pods: The schedulers and workers of Dask clusters.
            now: The time, with a time zone.
        """
        seen: dict[str, tuple[Object, str, str]] = {}
        for each in drivers:
            labels = each["metadata"].get("labels") or {}
            run = labels.get(LABEL_FLOW_RUN, "")
            self._deployments[run] = (
                labels.get("prefect.io/flow-name", _OTHER[0]),
                labels.get("prefect.io/deployment-name", _OTHER[1]),
            )
            seen[each["metadata"]["uid"]] = each, run, "driver"
        for each in dask_pods:
            labels = each["metadata"].get("labels") or {}
            kind = "scheduler" if labels.get("dask.org/component") == "scheduler" else "worker"
            seen[each["metadata"]["uid"]] = each, labels.get(LABEL_RUN, ""), kind
        for uid, (pod, run, kind) in seen.items():
            started = pod.get("status", {}).get("startTime")
            if started and pod["status"].get("phase") == "Running":
                begin = self._counted.get(uid) or max(datetime.fromisoformat(started), self._since)
                self._add(pod, self._deployments.get(run, _OTHER), kind, max(0.0, (now - begin).total_seconds()))
                self._counted[uid] = now
        self._counted = {uid: until for uid, until in self._counted.items() if uid in seen}
        runs = {run for _, run, _ in seen.values()}
        self._deployments = {run: each for run, each in self._deployments.items() if run in runs}

    def _add(self, pod: Object, deployment: tuple[str, str], kind: str, seconds: float) -> None:
        labels = (self._namespace, *deployment, kind)
        cores, gib = (requested(pod, name) for name in ("cpu", "memory"))
        core_seconds, gib_seconds = cores * seconds, gib / _GIB * seconds
        self._metrics.counter("run_core_seconds", *labels).inc(core_seconds)
        self._metrics.counter("run_gib_seconds", *labels).inc(gib_seconds)
        core_price, gib_price = self._prices
        if core_price or gib_price:
            price = (core_seconds * core_price + gib_seconds * gib_price) / _HOUR
            self._metrics.counter("run_cost", *labels).inc(price)


def requested(pod: Object, name: str) -> float:
    """Return the request of a pod's containers; Kubernetes takes a limit without a request as one."""
    resources = [each.get("resources") or {} for each in pod["spec"]["containers"]]
    found = [(each.get("requests") or {}).get(name) or (each.get("limits") or {}).get(name) for each in resources]
    return sum(quantity(each) or 0.0 for each in found if each)

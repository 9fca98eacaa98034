"""The sweep's metrics: what is left behind, for how long, and when it was last looked at."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING

from tidepool.compute.clusters.kubernetes.names import LABEL_SHARED
from tidepool.operate.sweep.observation import PARTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidepool.operate.metrics import Metrics
    from tidepool.operate.sweep.leftovers import Leftover
    from tidepool.operate.sweep.observation import Object, Observation

_KINDS = ("run", "shared")


class SweepFigures:
    """Metrics of all namespaces. Each is there before the first sweep.

    Args:
        metrics: The operator's metrics.
        namespaces: All namespaces of flow runs.
    """

    def __init__(self, metrics: Metrics, namespaces: Sequence[str]) -> None:
        self._metrics = metrics
        self._since: dict[str, dict[str, float]] = {each: {} for each in namespaces}  # first seen left behind, by uid
        for namespace in namespaces:
            metrics.gauge("reaper_last_sweep_timestamp_seconds", namespace).set(0)
            metrics.gauge("dask_orphan_oldest_seconds", namespace).set(0)
            for kind in ("DaskCluster", *PARTS):
                metrics.counter("reaper_deleted", namespace, kind)

    def observed(self, observation: Observation, left: Sequence[Leftover]) -> None:
        """Show the Dask clusters of a namespace, what of it is left behind, and that it was looked at."""
        namespace, now = observation.namespace, time.time()
        ages: dict[str, list[float]] = {each: [] for each in _KINDS}
        for each in observation.clusters:
            shared = LABEL_SHARED in (each["metadata"].get("labels") or {})
            ages["shared" if shared else "run"].append(max(0.0, now - _created(each)))
        for kind, found in ages.items():
            self._metrics.gauge("dask_clusters", namespace, kind).set(len(found))
            self._metrics.gauge("dask_cluster_oldest_seconds", namespace, kind).set(max(found, default=0.0))
        before = self._since.get(namespace, {})
        since = self._since[namespace] = {each.uid: before.get(each.uid, now) for each in left}
        oldest = max((now - each for each in since.values()), default=0.0)
        self._metrics.gauge("dask_orphan_oldest_seconds", namespace).set(oldest)
        self._metrics.gauge("reaper_last_sweep_timestamp_seconds", namespace).set(now)

    def deleted(self, leftover: Leftover) -> None:
        """Count a deletion."""
        self._metrics.counter("reaper_deleted", leftover.namespace, leftover.kind).inc()


def _created(found: Object) -> float:
    return datetime.fromisoformat(found["metadata"]["creationTimestamp"]).timestamp()

"""Every metric of tidepool: name, labels, meaning. The exporter and the Dask operator make them from this list.

`docs/metrics.md`, the alert rules and the dashboards are checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "tidepool_"
RUN = ("flow", "deployment", "tier", "team", "work_pool")
"""Labels of figures that an alert carries to a person; tier and team are the deployment's tags `tier:` and `owner:`."""
DEPLOYMENT = ("flow", "deployment")
MESSAGE_ENDS = ("accepted", "given up")
# Not `namespace` and `pod`, which Prometheus sets to those of the process that it scrapes.
NAMESPACE = ("run_namespace",)


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: Its name without `tidepool_`, and of a counter without `_total`.
        kind: Its Prometheus type.
        text: Its meaning, with the unit.
        labels: Names of its labels.
        buckets: Upper bounds, of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its time series."""
        if self.kind != "histogram":
            return (self.exported,)
        return tuple(f"{self.exported}{suffix}" for suffix in ("_bucket", "_count", "_sum"))


EXPORTER = (
    Metric("deployment_info", "gauge", "1 for each deployment on the Prefect server.", RUN),
    Metric(
        "flow_runs",
        "gauge",
        "Flow runs that have not ended, by state; Late and Scheduled are past their scheduled time.",
        (*RUN, "state"),
    ),
    Metric(
        "flow_run_oldest_seconds",
        "gauge",
        "Age of the oldest flow run in a state: seconds in that state, or past its scheduled time.",
        (*RUN, "state"),
    ),
    Metric(
        "flow_runs_finished",
        "counter",
        "Flow runs that have ended since the exporter started: Completed, Failed, Crashed or Cancelled.",
        (*RUN, "state"),
    ),
    Metric(
        "flow_run_duration_seconds",
        "histogram",
        "Seconds that finished flow runs were Running, since the exporter started; not of Cancelled ones.",
        DEPLOYMENT,
        (10, 30, 60, 180, 600, 1800, 3600, 10800, 43200),
    ),
    Metric(
        "flow_run_start_delay_seconds",
        "histogram",
        "Seconds from a flow run's scheduled time to its start, of finished ones, since the exporter started.",
        DEPLOYMENT,
        (5, 15, 30, 60, 300, 1800),
    ),
    Metric(
        "consecutive_failures",
        "gauge",
        "Failed or Crashed flow runs since the last Completed one; at least, of those before the exporter started.",
        RUN,
    ),
    Metric("last_success_timestamp_seconds", "gauge", "End of the last Completed flow run, Unix time.", RUN),
    Metric(
        "schedule_active",
        "gauge",
        "1 if one of a deployment's schedules is active and the deployment is not paused, otherwise 0.",
        RUN,
    ),
    Metric(
        "schedule_next_timestamp_seconds",
        "gauge",
        "Scheduled time of the next flow run that the server has created, Unix time.",
        DEPLOYMENT,
    ),
    Metric(
        "schedule_interval_seconds",
        "gauge",
        "Longest time between two of the next twelve times of a deployment's most frequent active schedule.",
        DEPLOYMENT,
    ),
    Metric(
        "schedule_paused_seconds",
        "gauge",
        "Seconds since a paused deployment, or one with all schedules inactive, was last changed.",
        RUN,
    ),
    Metric(
        "worker_last_heartbeat_timestamp_seconds",
        "gauge",
        "Last heartbeat of a pool's Prefect workers, Unix time; 0 if active schedules use the pool and it had none.",
        ("work_pool",),
    ),
    Metric("workers_online", "gauge", "Prefect workers of a work pool that are online.", ("work_pool",)),
    Metric(
        "pool_slots_used", "gauge", "Flow runs of a work pool that are Pending, Running or Cancelling.", ("work_pool",)
    ),
    Metric("pool_slots_limit", "gauge", "Concurrency limit of a work pool; absent without one.", ("work_pool",)),
    Metric("pool_paused", "gauge", "1 if a work pool is paused, otherwise 0.", ("work_pool",)),
    Metric("budget_per_day", "gauge", "A team's budget for a day: TIDEPOOL_EXPORTER_BUDGETS.", ("team",)),
    Metric(
        "messages",
        "counter",
        "Messages about failed runs since the exporter started: accepted by a target, or given up.",
        ("end",),
    ),
    Metric("prefect_api_up", "gauge", "1 if the last reading of the Prefect server succeeded, otherwise 0."),
    Metric(
        "prefect_api_request_seconds",
        "histogram",
        "Duration of the exporter's own requests to the Prefect server.",
        (),
        (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20),
    ),
    Metric("exporter_refresh_seconds", "gauge", "Duration of the last reading of the Prefect server."),
    Metric("exporter_refresh_requests", "gauge", "Requests of the last reading of the Prefect server."),
    Metric("exporter_last_read_timestamp_seconds", "gauge", "Last reading that succeeded, Unix time; 0 if none has."),
    Metric(
        "exporter_snapshot_age_seconds", "gauge", "Age of the figures on this page: seconds since they were written."
    ),
    Metric(
        "exporter_truncated",
        "gauge",
        "1 if a part of the figures is incomplete, because there is more than the exporter reads; otherwise 0.",
        ("part",),
    ),
)
OPERATOR = (
    Metric("dask_clusters", "gauge", "Dask clusters of a namespace.", (*NAMESPACE, "kind")),
    Metric(
        "dask_cluster_oldest_seconds", "gauge", "Age of the oldest Dask cluster of a namespace.", (*NAMESPACE, "kind")
    ),
    Metric(
        "dask_orphan_oldest_seconds",
        "gauge",
        "Time for which the sweep has found the same thing left behind, the longest of a namespace; 0 if nothing is.",
        NAMESPACE,
    ),
    Metric(
        "reaper_last_sweep_timestamp_seconds",
        "gauge",
        "Last complete sweep of a namespace, Unix time; 0 before the first.",
        NAMESPACE,
    ),
    Metric(
        "reaper_deleted",
        "counter",
        "Things that the sweep has deleted since the operator started.",
        (*NAMESPACE, "kind"),
    ),
    Metric(
        "run_core_seconds",
        "counter",
        "CPU requests of drivers and Dask pods, in cores, times the seconds that they ran, since the operator started.",
        (*NAMESPACE, *DEPLOYMENT, "component"),
    ),
    Metric(
        "run_gib_seconds",
        "counter",
        "Memory requests of drivers and Dask pods, in GiB, times the seconds that they ran; as above.",
        (*NAMESPACE, *DEPLOYMENT, "component"),
    ),
    Metric(
        "run_cost",
        "counter",
        "Price of these core-hours and GiB-hours, since the operator started; absent while both prices are 0.",
        (*NAMESPACE, *DEPLOYMENT, "component"),
    ),
)
ALL = EXPORTER + OPERATOR


class Metrics:
    """The metrics of one process, in a registry of their own.

    Args:
        metrics: What it exports.
    """

    def __init__(self, metrics: Iterable[Metric]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

        disable_created_metrics()  # type: ignore[no-untyped-call] # it would be one more series for each
        self.registry: CollectorRegistry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for each in metrics:
            name = f"{PREFIX}{each.name}"
            if each.kind == "histogram":
                made = Histogram(name, each.text, each.labels, registry=self.registry, buckets=each.buckets)
                self._histograms[each.name] = made
            elif each.kind == "counter":
                self._counters[each.name] = Counter(name, each.text, each.labels, registry=self.registry)
            else:
                self._gauges[each.name] = Gauge(name, each.text, each.labels, registry=self.registry)

    def gauge(self, name: str, *labels: str) -> Gauge:
        """Return the gauge of a metric with these labels."""
        found = self._gauges[name]
        return found.labels(*labels) if labels else found

    def counter(self, name: str, *labels: str) -> Counter:
        """Return the counter of a metric with these labels; it exists, at 0, from then on."""
        return self._counters[name].labels(*labels)

    def histogram(self, name: str, *labels: str) -> Histogram:
        """Return the histogram of a metric with these labels; it exists, empty, from then on."""
        found = self._histograms[name]
        return found.labels(*labels) if labels else found

    def clear(self, *names: str) -> None:
        """Remove all series of these gauges."""
        for name in names:
            self._gauges[name].clear()

    def remove(self, name: str, *labels: str) -> None:
        """Remove one series of a counter or histogram."""
        (self._counters.get(name) or self._histograms[name]).remove(*labels)

    def page(self) -> bytes:
        """Return all series in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

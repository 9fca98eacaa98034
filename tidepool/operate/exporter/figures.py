"""From what was read of the Prefect server to the metrics of `tidepool.operate.metrics`."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from tidepool.operate.exporter.records import FINAL, OTHER, Deployment, Run
from tidepool.operate.metrics import EXPORTER, MESSAGE_ENDS, Metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tidepool.operate.exporter.reader import Reader, Reading
    from tidepool.operate.exporter.records import Json

# Without an answer of the server, what it said last is shown for so long: an alert must not be taken back at once.
KEPT_SECONDS = 300.0
_SLOT = {"Pending", "Running", "Cancelling"}
_PARTS = ("deployments", "work_pools", "live", "due", "finished")
_TIMES = 12
_OF_THE_SERVER = tuple(
    each.name
    for each in EXPORTER
    if each.kind == "gauge" and each.labels and each.name not in {"budget_per_day", "exporter_truncated"}
)


class Figures:
    """The exporter's metrics.

    Args:
        budgets: Budget of each team for a day.
    """

    def __init__(self, budgets: Mapping[str, float]) -> None:
        # The age of a page is added when it is read.
        self._metrics = Metrics(each for each in EXPORTER if each.name != "exporter_snapshot_age_seconds")
        self._known: dict[str, Deployment] = {"": OTHER}
        self._intervals: dict[str, float | None] = {}
        self._last_read = 0.0
        for team, budget in budgets.items():
            self._metrics.gauge("budget_per_day", team).set(budget)
        self._begin(OTHER)
        self._metrics.gauge("exporter_last_read_timestamp_seconds").set(0)
        for end in MESSAGE_ENDS:
            self._metrics.counter("messages", end)

    def observe_request(self, seconds: float) -> None:
        """Count a request to the server."""
        self._metrics.histogram("prefect_api_request_seconds").observe(seconds)

    def count_message(self, end: str) -> None:
        """Count a message that was sent or given up."""
        self._metrics.counter("messages", end).inc()

    def page(self) -> bytes:
        """Return the figures in Prometheus' text format."""
        return self._metrics.page()

    def update(self, reader: Reader, reading: Reading, seconds: float) -> None:
        """Show what was just read.

        Args:
            reader: The reader, with what it remembers.
            reading: What changed.
            seconds: How long it took.
        """
        now = self._last_read = time.time()
        metrics = self._metrics
        self._follow(reader.inventory.deployments)
        for run in reading.finished:
            self._count(run)
        metrics.clear(*_OF_THE_SERVER)
        self._show_runs(reading.live, now)
        self._show_deployments(reader, now)
        self._show_pools(reader, reading.live)
        metrics.gauge("prefect_api_up").set(1)
        metrics.gauge("exporter_refresh_seconds").set(seconds)
        metrics.gauge("exporter_refresh_requests").set(reading.requests)
        metrics.gauge("exporter_last_read_timestamp_seconds").set(now)
        for part in _PARTS:
            metrics.gauge("exporter_truncated", part).set(part in reading.truncated)

    def fail(self) -> None:
        """Show that the server could not be read; its figures disappear after `KEPT_SECONDS`."""
        self._metrics.gauge("prefect_api_up").set(0)
        if time.time() - self._last_read > KEPT_SECONDS:
            self._metrics.clear(*_OF_THE_SERVER)

    def _follow(self, deployments: Mapping[str, Deployment]) -> None:
        """Keep the counters to the deployments that exist: each is there, at 0, before its first run ends."""
        now = {"": OTHER, **deployments}
        for id_, each in self._known.items():
            if each.labels != (now[id_].labels if id_ in now else None):
                for state in FINAL.values():
                    self._metrics.remove("flow_runs_finished", *each.labels, state)
                if each.key not in {other.key for other in now.values()}:
                    self._metrics.remove("flow_run_duration_seconds", *each.key)
                    self._metrics.remove("flow_run_start_delay_seconds", *each.key)
        for each in now.values():
            self._begin(each)
        self._known = now

    def _begin(self, deployment: Deployment) -> None:
        for state in FINAL.values():
            self._metrics.counter("flow_runs_finished", *deployment.labels, state)
        self._metrics.histogram("flow_run_duration_seconds", *deployment.key)
        self._metrics.histogram("flow_run_start_delay_seconds", *deployment.key)

    def _count(self, run: Run) -> None:
        deployment = self._of(run)
        self._metrics.counter("flow_runs_finished", *deployment.labels, run.state).inc()
        if run.started is not None:
            delay = max(0.0, run.started - run.expected)
            self._metrics.histogram("flow_run_start_delay_seconds", *deployment.key).observe(delay)
            if run.state != "Cancelled":
                self._metrics.histogram("flow_run_duration_seconds", *deployment.key).observe(run.seconds)

    def _show_runs(self, live: Iterable[Run], now: float) -> None:
        since: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for run in live:
            since[(*self._of(run).labels, run.state)].append(run.since)
        for labels, begun in since.items():
            self._metrics.gauge("flow_runs", *labels).set(len(begun))
            self._metrics.gauge("flow_run_oldest_seconds", *labels).set(max(0.0, now - min(begun)))

    def _show_deployments(self, reader: Reader, now: float) -> None:
        show = self._metrics.gauge
        for id_, each in reader.inventory.deployments.items():
            show("deployment_info", *each.labels).set(1)
            fact = reader.facts.get(id_)
            if fact is not None and fact.asked:
                show("consecutive_failures", *each.labels).set(fact.failures)
                if fact.success is not None:
                    show("last_success_timestamp_seconds", *each.labels).set(fact.success)
            if not each.scheduled:
                continue
            show("schedule_active", *each.labels).set(bool(each.schedules))
            if not each.schedules:
                show("schedule_paused_seconds", *each.labels).set(max(0.0, now - each.changed))
            intervals = [found for schedule in each.schedules if (found := self._interval(schedule)) is not None]
            if intervals:
                show("schedule_interval_seconds", *each.key).set(min(intervals))
            if (coming := reader.next.get(id_)) is not None:
                show("schedule_next_timestamp_seconds", *each.key).set(coming)

    def _show_pools(self, reader: Reader, live: Iterable[Run]) -> None:
        show = self._metrics.gauge
        slots = Counter(run.pool for run in live if run.state in _SLOT)
        needed = {each.pool for each in reader.inventory.deployments.values() if each.schedules}
        for name, pool in reader.inventory.pools.items():
            show("pool_slots_used", name).set(slots[name])
            show("pool_paused", name).set(pool.paused)
            if pool.limit is not None:
                show("pool_slots_limit", name).set(pool.limit)
            if name in reader.heartbeats:
                show("workers_online", name).set(reader.online[name])
                if reader.heartbeats[name] or name in needed:
                    show("worker_last_heartbeat_timestamp_seconds", name).set(reader.heartbeats[name])

    def _of(self, run: Run) -> Deployment:
        return self._known.get(run.deployment, OTHER)

    def _interval(self, schedule: Json) -> float | None:
        """Return the longest time between two of a schedule's next times; None if it has fewer than two."""
        key = json.dumps(schedule, sort_keys=True)
        if key not in self._intervals:
            self._intervals[key] = longest_interval(schedule)
        return self._intervals[key]


def longest_interval(schedule: Json) -> float | None:
    """Return the longest time between two of the next twelve times of a schedule, in seconds; None without two."""
    from datetime import UTC, datetime

    from tidepool.deploy.config.schedules import next_runs, normal_form

    try:
        times = next_runs(normal_form(schedule), datetime.now(UTC), _TIMES)
    except ValueError:  # it fires no more
        return None
    return max(((later - earlier).total_seconds() for earlier, later in pairwise(times)), default=None)

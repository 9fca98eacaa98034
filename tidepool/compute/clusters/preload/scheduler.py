"""Dask preload of a scheduler on Kubernetes: `dask scheduler --preload tidepool.compute.clusters.preload.scheduler`.

It adds up what the workers used, counts a connected driver as activity, never offers a busy worker to be closed, and
loads the dashboard's pages with their first visitor.
"""

from __future__ import annotations

from time import time
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.http.utils import RequestHandler

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler, WorkerState
    from tornado.httputil import HTTPServerRequest

# The name of the scheduler's handler that returns `ClusterPlugin.usage`.
USAGE = "tidepool_usage"


class ClusterPlugin(SchedulerPlugin):
    """Figures of all workers, also of those that left, and protection of busy ones."""

    name = "tidepool"

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.seen: dict[str, tuple[WorkerState, float]] = {}
        self.left: dict[str, float] = {}

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Record a worker's arrival. Its state object outlives its removal, with the last figures that it sent."""
        self.seen[worker] = (scheduler.workers[worker], time())

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:  # noqa: ARG002 - the plugin's interface
        """Record a worker's end."""
        self.left.setdefault(worker, time())

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[WorkerState]) -> list[WorkerState]:  # noqa: ARG002
        """Return the idle workers: only they may be closed. By default scaling down closes busy ones too."""
        return [worker for worker in workers if not worker.processing]

    def usage(self) -> dict[str, Any]:
        """Return what was used until now.

        Returns:
            `busy_seconds` (thread-seconds inside tasks), and `workers`: for each one its name, `seconds` of life,
            `threads`, `memory_limit` and `memory_peak` (bytes), `cpu_seconds`.
        """
        nothing = {"memory_peak": 0, "cpu_seconds": 0.0}
        workers = [
            {
                "name": str(state.name),
                "seconds": self.left.get(address, time()) - joined,
                "threads": state.nthreads,
                "memory_limit": state.memory_limit or 0,
                **((state.metrics or {}).get("tidepool") or nothing),
            }
            for address, (state, joined) in self.seen.items()
        ]
        busy = sum(prefix.all_durations.get("compute", 0.0) for prefix in self.scheduler.task_prefixes.values())
        return {"busy_seconds": busy, "workers": workers}


class CheckIdle(RequestHandler):
    """Since when the cluster has been idle, without tasks and connected clients. The operator asks every 5 s."""

    idle_since = 0.0

    def get(self) -> None:
        """Answer `{"idle_since": …}`, seconds since the epoch; 0 while in use, where upstream answers null."""
        scheduler = self.server
        busy = scheduler.check_idle() is None or any(name != "fire-and-forget" for name in scheduler.clients)
        CheckIdle.idle_since = 0.0 if busy else CheckIdle.idle_since or time()
        self.write({"idle_since": CheckIdle.idle_since})


class AdaptiveTarget(RequestHandler):
    """Desired number of workers, at least those that are busy. The operator's autoscaler asks."""

    def get(self) -> None:
        """Answer `{"workers": …}`."""
        scheduler = self.server
        busy = sum(bool(worker.processing) for worker in scheduler.workers.values())
        self.write({"workers": max(scheduler.adaptive_target(), busy)})


class LazyDashboard:
    """A stand-in for the dashboard among the HTTP applications, until a page is opened that only the dashboard has.

    The dashboard's libraries take longer to import than the scheduler itself, and most clusters end without a visitor.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def find_handler(self, request: HTTPServerRequest, **options: Any) -> Any:
        """Replace itself by the dashboard, which answers."""
        from distributed.dashboard.scheduler import connect

        application = self.scheduler.http_application
        application.applications.remove(self)
        connect(application, self.scheduler.http_server, self.scheduler)
        return application.applications[-1].find_handler(request, **options)


# Before distributed's own in the scheduler's settings: the first match answers.
routes: list[tuple[str, type[RequestHandler], dict[str, Any]]] = [
    ("/api/v1/check_idle", CheckIdle, {}),
    ("/api/v1/adaptive_target", AdaptiveTarget, {}),
]


async def dask_setup(scheduler: Scheduler) -> None:
    """Extend the scheduler when it starts."""
    plugin = ClusterPlugin(scheduler)
    scheduler.add_plugin(plugin)
    scheduler.handlers[USAGE] = plugin.usage
    # tornado calls its one method only.
    scheduler.http_application.applications.append(LazyDashboard(scheduler))

"""Lost Dask workers: how many a task run may lose, and the causes in words."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from tidepool.errors import TidepoolError
from tidepool.report import exits
from tidepool.settings import settings
from tidepool.upstream.distributed import PersistentNanny

if TYPE_CHECKING:
    from distributed import Client
    from prefect import Task

# Topic on which a ReportingNanny reports the exit code of its worker process.
EXIT_TOPIC = "tidepool-worker-exit"
# Topic of every nanny that ends a worker process above its memory limit.
MEMORY_TOPIC = "worker-restart-memory"


class WorkerLostError(TidepoolError):
    """A task run lost its worker too often, or its whole cluster."""


class ReportingNanny(PersistentNanny):
    """A nanny that reports the exit codes of its worker process to the scheduler, and preloads `local_worker` there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        others = [self.preload] if isinstance(self.preload, str) else self.preload
        self.preload = [*others, "tidepool.compute.clusters.preload.local_worker"]
        if self.preload_argv and not isinstance(self.preload_argv[0], str):
            self.preload_argv = [*self.preload_argv, []]  # a list for each

    def worker_exited(self, exitcode: int) -> None:
        """Send the exit code to the scheduler, in the background."""
        self.loop.add_callback(self._report_exit, self.worker_address, exitcode)

    async def _report_exit(self, address: str | None, exitcode: int) -> None:
        # A scheduler that closes at the same time does not need to know.
        with suppress(OSError):
            await self.scheduler.log_event(topic=EXIT_TOPIC, msg={"worker": address, "exitcode": exitcode})


class Exits:
    """Exits of workers, by address; fed by the scheduler's events."""

    def __init__(self) -> None:
        self._reported = threading.Condition()
        self._causes: dict[str, str] = {}

    def follow(self, client: Client) -> None:
        """Subscribe to the events of that client's scheduler."""
        client.subscribe_topic(EXIT_TOPIC, self._on_exit)
        client.subscribe_topic(MEMORY_TOPIC, self._on_memory_limit)

    def cause(self, address: str, cluster: Any, seconds: float = 1.0) -> str | None:
        """Return the cause of that worker's exit, such as `out of memory (137)`; None if unknown.

        A cluster that has a method `worker_exit(address)` is asked, such as one of Kubernetes pods; for others, an
        event is waited for, for at most that many seconds.
        """
        if worker_exit := getattr(cluster, "worker_exit", None):
            return cast("str | None", worker_exit(address))
        with self._reported:
            self._reported.wait_for(lambda: address in self._causes, timeout=seconds)
            return self._causes.get(address)

    def _on_exit(self, event: tuple[float, dict[str, Any]]) -> None:
        with self._reported:
            self._causes.setdefault(event[1]["worker"], exits.process(event[1]["exitcode"]))
            self._reported.notify_all()

    def _on_memory_limit(self, event: tuple[float, dict[str, Any]]) -> None:
        with self._reported:
            self._causes[event[1]["worker"]] = exits.out_of_memory()
            self._reported.notify_all()


def allowed_losses(task: Task[..., Any]) -> int:
    """Return how often a task run may lose its worker: the setting, or once more than its retries."""
    return max(settings().compute.worker_losses, task.retries + 1)

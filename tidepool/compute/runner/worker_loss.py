"""Causes of lost Dask workers, in words."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tidepool.errors import TidepoolError
from tidepool.upstream.distributed import PersistentNanny

if TYPE_CHECKING:
    from distributed import Client

# Topic on which a ReportingNanny reports the exit code of its worker process.
EXIT_TOPIC = "tidepool-worker-exit"
# Topic of every nanny that ends a worker process above its memory limit.
MEMORY_TOPIC = "worker-restart-memory"


class WorkerLostError(TidepoolError):
    """A task run lost its worker too often, or its whole cluster."""


@runtime_checkable
class KnowsExits(Protocol):
    """A cluster that knows why its workers exit, such as one of Kubernetes pods."""

    def worker_exit(self, address: str) -> str | None:
        """Return the cause of that worker's exit, such as `out of memory (137)`; None if unknown."""
        ...


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
        self._codes: dict[str, int] = {}
        self._over_memory: set[str] = set()

    def follow(self, client: Client) -> None:
        """Subscribe to the events of that client's scheduler."""
        client.subscribe_topic(EXIT_TOPIC, self._on_exit)
        client.subscribe_topic(MEMORY_TOPIC, self._on_memory_limit)

    def cause(self, address: str, cluster: Any, seconds: float = 1.0) -> str | None:
        """Return the cause of that worker's exit; None if none is reported within that many seconds."""
        if isinstance(cluster, KnowsExits):
            return cluster.worker_exit(address)
        with self._reported:
            self._reported.wait_for(lambda: address in self._codes or address in self._over_memory, timeout=seconds)
            if address in self._over_memory:
                return "out of memory (137)"
            return describe_exit(self._codes[address]) if address in self._codes else None

    def _on_exit(self, event: tuple[float, dict[str, Any]]) -> None:
        with self._reported:
            self._codes[event[1]["worker"]] = event[1]["exitcode"]
            self._reported.notify_all()

    def _on_memory_limit(self, event: tuple[float, dict[str, Any]]) -> None:
        with self._reported:
            self._over_memory.add(event[1]["worker"])
            self._reported.notify_all()


def describe_exit(code: int) -> str:
    """Describe an exit code of Python's (negative: the signal) in words, with the code that a shell shows."""
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name} ({128 - code})"

"""Why a Dask worker was lost, in words."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from distributed import Nanny, Status

from tidepool.errors import TidepoolError

if TYPE_CHECKING:
    from distributed import Client

# What a ReportingNanny says when its worker process has ended.
EXIT_TOPIC = "tidepool-worker-exit"
# How often a worker process is started before its nanny gives up.
_STARTS = 4
# What every nanny says before it ends a worker process that needs too much memory.
MEMORY_TOPIC = "worker-restart-memory"


class WorkerLostError(TidepoolError):
    """A task run lost its worker too often, or the whole cluster."""


@runtime_checkable
class KnowsExits(Protocol):
    """A cluster that can say why one of its workers has ended, such as one of Kubernetes pods."""

    def worker_exit(self, address: str) -> str | None:
        """Why the worker at that address has ended, such as `out of memory (137)`; None when it is not known."""
        ...


class ReportingNanny(Nanny):
    """A nanny that tells the scheduler with which exit code its worker process has ended, and starts the next one.

    The process has `local_worker` loaded, behind what else is to be preloaded.

    Dask's own closes when a process ends before it was seen to have started. A task that kills its process is sent to
    the new one as soon as that answers the scheduler: the nanny hears of it later, and the cluster lost its workers.
    """

    _starts = 0  # that are tried again if they fail; exits overlap

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        others = [self.preload] if isinstance(self.preload, str) else self.preload
        self.preload = [*others, "tidepool.compute.clusters.preload.local_worker"]
        if self.preload_argv and not isinstance(self.preload_argv[0], str):
            self.preload_argv = [*self.preload_argv, []]  # a list for each

    async def instantiate(self) -> Status:
        """Starts the worker process; again when it ends on the way.

        Raises:
            Exception: the last start failed, or the nanny is told to close.
        """
        for _ in range(_STARTS - 1):
            self._starts += 1
            try:
                status = await super().instantiate()
            except Exception:  # Dask has logged it
                if self.status not in {Status.init, Status.running}:
                    raise
            else:
                if status == Status.running or self.status not in {Status.init, Status.running}:
                    return status
            finally:
                self._starts -= 1
        return await super().instantiate()

    async def close(  # type: ignore[override] # as Nanny overrides Server's
        self,
        timeout: float = 5,  # noqa: ASYNC109 - Dask's
        reason: str = "nanny-close",
    ) -> Literal["OK"]:
        """Closes, but not for a start that is tried again."""
        if self._starts and reason == "nanny-instantiate-failed":
            return "OK"
        return await super().close(timeout=timeout, reason=reason)

    def _on_worker_exit_sync(self, exitcode: int) -> None:
        if self.status == Status.running:
            self._ongoing_background_tasks.call_soon(self._report_exit, self.worker_address, exitcode)
        super()._on_worker_exit_sync(exitcode)  # type: ignore[no-untyped-call] # distributed leaves it unannotated

    async def _report_exit(self, address: str, exitcode: int) -> None:
        # When the scheduler closes at the same time, nobody asks any more.
        with suppress(OSError):
            await self.scheduler.log_event(topic=EXIT_TOPIC, msg={"worker": address, "exitcode": exitcode})


class Exits:
    """What is known of workers that have ended, by address; fed by the scheduler's events."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._codes: dict[str, int] = {}
        self._over_memory: set[str] = set()

    def follow(self, client: Client) -> None:
        """Begins to listen to what that client's scheduler says."""
        client.subscribe_topic(EXIT_TOPIC, self._exited)
        client.subscribe_topic(MEMORY_TOPIC, self._over_memory_limit)

    def why(self, address: str, cluster: Any, seconds: float = 1.0) -> str | None:
        """Why the worker at that address has ended; None when nobody says so within that many seconds."""
        if isinstance(cluster, KnowsExits):
            return cluster.worker_exit(address)
        with self._news:
            self._news.wait_for(lambda: address in self._codes or address in self._over_memory, timeout=seconds)
            if address in self._over_memory:
                return "out of memory (137)"
            return exit_in_words(self._codes[address]) if address in self._codes else None

    def _exited(self, event: tuple[float, dict[str, Any]]) -> None:
        with self._news:
            self._codes[event[1]["worker"]] = event[1]["exitcode"]
            self._news.notify_all()

    def _over_memory_limit(self, event: tuple[float, dict[str, Any]]) -> None:
        with self._news:
            self._over_memory.add(event[1]["worker"])
            self._news.notify_all()


def exit_in_words(code: int) -> str:
    """An exit code as Python gives it (negative: the signal), in words with the code that a shell shows."""
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name} ({128 - code})"

"""Private parts of distributed: futures and nannies; those of clusters are in `distributed_cluster`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

from distributed import Nanny, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Future

# How often a worker process is started before its nanny gives up.
_STARTS = 4


def call_whenever_done(future: Future[Any], call: Callable[[], None]) -> None:
    """Call `call` each time the Dask future is done: at once if it is. Use it on the client's event loop only.

    Why: `Future.add_done_callback` runs a coroutine and a thread for each future, a quarter of the driver's CPU time at
    thousands of them, and reports only the first time.
    Watch: `distributed.client.FutureState`.
    Delete when: distributed offers a callback on its event loop.

    Args:
        future: The future of a `Client`.
        call: Must not hold the future, which would keep it alive.
    """
    state: Any = future._state
    done, state._event = state.done(), _CallingEvent(call)
    if done:
        state._event.set()


class _CallingEvent(asyncio.Event):
    """An event that also calls a function each time it is set."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__()
        self._call = call

    def set(self) -> None:
        super().set()
        self._call()


class PersistentNanny(Nanny):
    """A nanny that starts its worker process again when a start fails, and hears of every exit.

    Why: the stock nanny closes when its process ends before it was seen to have started. A task that kills its process
    is sent to the new one as soon as that answers the scheduler; the nanny hears of it later, and the cluster lost its
    workers. And it keeps exit codes to itself.
    Watch: `Nanny._on_worker_exit_sync`, and the reason "nanny-instantiate-failed" in `Nanny.instantiate`.
    Delete when: a `NannyPlugin` hears of exits, and a failed restart is tried again.
    """

    _starts = 0  # starts that are tried again if they fail; exits overlap

    def worker_exited(self, exitcode: int) -> None:
        """Handle the exit of a running worker process; called on the nanny's event loop."""

    async def instantiate(self) -> Status:
        """Start the worker process; again when it ends on the way."""
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
        """Close, but not for a start that is tried again."""
        if self._starts and reason == "nanny-instantiate-failed":
            return "OK"
        return await super().close(timeout=timeout, reason=reason)

    def _on_worker_exit_sync(self, exitcode: int) -> None:
        if self.status == Status.running:
            self.worker_exited(exitcode)
        super()._on_worker_exit_sync(exitcode)  # type: ignore[no-untyped-call] # distributed leaves it unannotated

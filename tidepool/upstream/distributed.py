"""Private parts of distributed: futures and nannies; those of clusters are in `distributed_cluster`."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from functools import cache
from multiprocessing import spawn
from typing import TYPE_CHECKING, Any, Literal

from distributed import Nanny, Status, get_worker
from distributed.threadpoolexecutor import thread_state, threads_lock
from distributed.worker import thread_state as task_state  # type: ignore[attr-defined] # imported there
from distributed.worker_state_machine import SecedeEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from distributed import Future

# How often a worker process is started before its nanny gives up.
_STARTS = 4
_WORKER_PROCESS = "Dask Worker process (from Nanny)"


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


@cache
def start_workers_without_main() -> None:
    """Have the worker processes of this process's nannies begin without the program's main module.

    Why: multiprocessing runs the main module again in each process that it spawns. A script without `if __name__ ==
    "__main__":` ran its flow again in each worker, which ended there and was started again; what was read from
    standard input is not even a file. Workers do not need it: what is defined there travels by value, as it does to
    workers on Kubernetes.
    Watch: `multiprocessing.spawn.get_preparation_data`, and the name of the process in `WorkerProcess.start`.
    Delete when: a nanny can be told to leave the main module out.
    """
    complete = spawn.get_preparation_data

    def without_main(name: str) -> dict[str, Any]:
        data = complete(name)
        if name != _WORKER_PROCESS:
            return data
        return {key: value for key, value in data.items() if not key.startswith("init_main_")}

    spawn.get_preparation_data = without_main


class WorkerSlot:
    """The place that the current Dask task has among the threads of its worker; created on the task's own thread.

    Why: a task that waits for tasks of its own has to let them have its place. `distributed.secede` and `rejoin` do
    that only on the task's thread, while an asynchronous flow and a task with a timeout wait in other threads.
    Watch: `distributed.threadpoolexecutor.secede` and `rejoin`, `distributed.worker.secede`.
    Delete when: both take a task or a thread, or Dask's futures leave and come back by themselves in any thread.

    Attributes:
        awaited: What the task may still wait for, by waiter: the place is not taken back before all are empty.
    """

    def __init__(self) -> None:
        self.awaited: list[Collection[Any]] = []
        self._thread = threading.current_thread()
        self._executor: Any = thread_state.executor
        self._key, self._begun = task_state.key, task_state.start_time
        self._worker = get_worker()
        self._lock = threading.Lock()
        self._left = self._reported = False

    @property
    def priority(self) -> int:
        """The priority that the client gave this task."""
        priority: Any = self._worker.state.tasks[self._key].priority
        return -int(priority[0])

    def leave(self) -> None:
        """Let another task run in this one's place, until `take_back`; nothing happens if it does already."""
        with self._lock:
            if self._left:
                return
            self._left = True
            with threads_lock:
                self._executor._threads.discard(self._thread)
                self._executor._adjust_thread_count()
            if not self._reported:
                self._reported = True
                event = SecedeEvent(
                    key=self._key, compute_duration=time.time() - self._begun, stimulus_id=f"slot-{time.time()}"
                )
                self._worker.loop.add_callback(self._worker.handle_stimulus, event)

    def take_back(self) -> None:
        """Wait for a place, if this task's was left and nothing is awaited any more."""
        with self._lock:
            if not self._left or any(self.awaited):
                return
            free = threading.Event()
            with self._executor._rejoin_lock:
                self._executor._rejoin_list.append((self._thread, free))
            with suppress(RuntimeError):  # the worker closes
                self._executor.submit(int)
            while not free.wait(1):
                if self._executor._shutdown:
                    return
            self._left = False

    def close(self) -> None:
        """End the task's thread with the task, on that thread, if its place is another one's."""
        with self._lock:
            if self._left:
                thread_state.proceed = False

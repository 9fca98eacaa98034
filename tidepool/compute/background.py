"""What Prefect does behind each task run, at less than half the cost: a Dask worker runs a hundred of them a second.

Three events and a log line belong to each. Prefect takes every one of them over two thread switches, and puts the
line on the console through a terminal's renderer: together a seventh of a worker's CPU at no-op tasks. What is sent
stays the same; what is printed too, without the terminal's emoji.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from typing import TYPE_CHECKING, Any

from prefect._internal.concurrency.api import create_call
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker, PrefectConsoleHandler
from prefect.settings import get_current_settings
from rich.console import Console

if TYPE_CHECKING:
    from typing import TextIO

    from prefect._internal.concurrency.threads import WorkerThread

# How often, and for how long after the last item, the queue is looked at before a thread waits for the next one.
_PAUSE_SECONDS = 0.05
_LINGER_SECONDS = 0.5

# Not public, and pinned by contract tests: their instances, the queue of each, and the thread that waits for it.
_SERVICES: tuple[Any, ...] = (EventsWorker, APILogWorker)


def gather_what_is_sent() -> None:
    """Has the services that send events and log lines take several at a time; for those that run now."""
    # One dictionary for all of Prefect's services.
    for service in list(_SERVICES[0]._instances.values()):
        if isinstance(service, _SERVICES) and not isinstance(service._queue_get_thread, _Lingering):
            service._queue_get_thread = _Lingering(service._queue_get_thread, service._queue)


def print_plainly() -> None:
    """Lets Prefect's console handlers write their lines as they are, where no terminal would show colours."""
    if get_current_settings().logging.markup:
        return
    names = [None, *logging.root.manager.loggerDict]
    for handler in {handler for name in names for handler in logging.getLogger(name).handlers}:
        console: Any = getattr(handler, "console", None)
        if isinstance(handler, PrefectConsoleHandler) and isinstance(console, Console) and not console.is_terminal:
            handler.console = _Plain(handler.stream)  # type: ignore[assignment] # it is only asked to print


class _Lingering:
    """The thread in which one of Prefect's services waits for its next item, woken once for many of them.

    Args:
        thread: That thread.
        items: The service's queue.
    """

    def __init__(self, thread: WorkerThread, items: queue.Queue[Any]) -> None:
        self._thread = thread
        self._items = items

    def submit(self, call: Any) -> _Next:  # noqa: ANN401 - Prefect's Call, which has no type
        """What the service asks for: the call is the queue's `get`."""
        return _Next(self._thread, self._items, call)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def shutdown(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()


class _Next:
    """The next item of a service's queue."""

    def __init__(self, thread: WorkerThread, items: queue.Queue[Any], get: Any) -> None:  # noqa: ANN401 - a Call
        self._thread = thread
        self._items = items
        self._get = get

    async def aresult(self) -> Any:  # noqa: ANN401 - any item
        # A service that sends batches waits until its interval is over, no longer.
        timeout = self._get.kwargs.get("timeout")
        begun = time.monotonic()
        linger = _LINGER_SECONDS if timeout is None else min(timeout, _LINGER_SECONDS)
        while True:
            try:
                return self._items.get_nowait()
            except queue.Empty:
                waited = time.monotonic() - begun
                if timeout is not None and waited >= timeout:
                    raise
                if waited >= linger:
                    break
            await asyncio.sleep(min(_PAUSE_SECONDS, linger))
        get = self._get if timeout is None else create_call(self._get.fn, timeout=timeout - waited)
        return await self._thread.submit(get).aresult()


class _Plain:
    """A console that is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def print(self, line: str, *, soft_wrap: bool = True) -> None:  # noqa: ARG002 - the file's reader wraps
        """Writes the line."""
        self._stream.write(f"{line}\n")
        self._stream.flush()

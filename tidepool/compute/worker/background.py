"""What Prefect does behind each task run, at less than half the cost: a Dask worker runs a hundred of them a second.

Three events and a log line belong to each. Prefect takes every one of them over two thread switches, finds out for each
event again what it relates to, and puts the line on the console through a terminal's renderer: together a fifth of a
worker's CPU at no-op tasks. What is sent stays the same; what is printed too, without the terminal's emoji.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import prefect.events.worker
from prefect._internal.concurrency.api import create_call
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events.related import related_resources_from_run_context
from prefect.events.worker import EventsWorker
from prefect.filesystems import LocalFileSystem
from prefect.logging.handlers import APILogWorker, PrefectConsoleHandler
from prefect.settings import get_current_settings
from rich.console import Console

if TYPE_CHECKING:
    from typing import TextIO

    from prefect._internal.concurrency.threads import WorkerThread
    from prefect.client.orchestration import PrefectClient
    from prefect.events.schemas.events import RelatedResource

# How often, and for how long after the last item, the queue is looked at before a thread waits for the next one.
_PAUSE_SECONDS = 0.05
_LINGER_SECONDS = 0.5

_KEPT_FLOW_RUNS = 100
_prefects_resolve_path: Any = LocalFileSystem._resolve_path
_related_to: dict[tuple[Any, ...], list[RelatedResource]] = {}

# Not public, and pinned by contract tests: their instances, the queue of each, and the thread that waits for it.
_SERVICES: tuple[Any, ...] = (EventsWorker, APILogWorker)


def gather_what_is_sent() -> None:
    """Has the services that send events and log lines take several at a time; for those that run now."""
    # One dictionary for all of Prefect's services.
    for service in list(_SERVICES[0]._instances.values()):
        if isinstance(service, _SERVICES) and not isinstance(service._queue_get_thread, _Lingering):
            service._queue_get_thread = _Lingering(service._queue_get_thread, service._queue)


def relate_once() -> None:
    """Has Prefect's events worker keep what it says of a flow run with each event: its flow, deployment, pool, tags."""
    prefect.events.worker.related_resources_from_run_context = _related  # type: ignore[attr-defined] # it imports it


def resolve_once() -> None:
    """Has Prefect's result storage on this machine keep where it is, instead of asking the file system 21 times."""
    LocalFileSystem._resolve_path = _resolve_path  # type: ignore[method-assign]


def print_plainly() -> None:
    """Lets Prefect's console handlers write their lines as they are, where no terminal would show colours."""
    if get_current_settings().logging.markup:
        return
    names = [None, *logging.root.manager.loggerDict]
    for handler in {handler for name in names for handler in logging.getLogger(name).handlers}:
        console: Any = getattr(handler, "console", None)
        if isinstance(handler, PrefectConsoleHandler) and isinstance(console, Console) and not console.is_terminal:
            handler.console = _Plain(handler.stream)  # type: ignore[assignment] # it is only asked to print


async def _related(client: PrefectClient, exclude: set[str] | None = None) -> list[RelatedResource]:
    flow_run: Any = getattr(FlowRunContext.get(), "flow_run", None)
    task_run_context, excluded = TaskRunContext.get(), exclude or set()
    own = {f"prefect.task-run.{task_run_context.task_run.id}"} if task_run_context else set()
    # An event of the author's inside a task relates to the task run as well: that one is not for others.
    if flow_run and own <= excluded:
        # All that Prefect reads of it: a flow run that is run again may have another name, or tags.
        belongs = (flow_run.flow_id, flow_run.deployment_id, flow_run.work_queue_id, flow_run.work_pool_name)
        key = (flow_run.id, flow_run.name, *belongs, *flow_run.tags)
        if key not in _related_to:
            if len(_related_to) >= _KEPT_FLOW_RUNS:
                _related_to.clear()
            _related_to[key] = await related_resources_from_run_context(client=client, exclude=own)
        related = _related_to[key]
        if not any(resource.id in excluded for resource in related):
            return list(related)
    return await related_resources_from_run_context(client=client, exclude=exclude)


@cache
def _resolved(path: str) -> Path:
    return Path(path).resolve()


def _resolve_path(self: LocalFileSystem, path: str | None) -> Path:
    # A name in a folder that does not depend on the current one; Prefect says what anything else is.
    base = self.basepath
    is_name = isinstance(path, str) and path not in {"", ".", ".."} and "/" not in path and path[0] != "~"
    if path and is_name and base and base.startswith("/"):
        resolved = _resolved(base) / path
        # Unlike Path.is_symlink, it is False where nobody may look.
        if not os.path.islink(resolved):  # noqa: PTH114
            return resolved
    return cast("Path", _prefects_resolve_path(self, path))


class _Lingering:
    """The thread in which one of Prefect's services waits for its next item, woken once for many of them.

    Args:
        thread: That thread.
        items: The service's queue.
    """

    def __init__(self, thread: WorkerThread, items: queue.Queue[Any]) -> None:
        self._thread = thread
        self._items = items

    def submit(self, call: Any) -> _Next:
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

    def __init__(self, thread: WorkerThread, items: queue.Queue[Any], get: Any) -> None:
        self._thread = thread
        self._items = items
        self._get = get

    async def aresult(self) -> Any:
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

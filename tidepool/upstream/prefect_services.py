"""Private parts of Prefect that send events and log lines: a Dask worker runs a hundred task runs per second."""

from __future__ import annotations

import asyncio
import time
from functools import cache
from typing import TYPE_CHECKING, Any

import prefect.events.worker
from prefect._internal.concurrency.services import _QueueServiceBase
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events.related import related_resources_from_run_context

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.events.schemas.events import RelatedResource

# How often an empty queue is looked at, and how long before a thread waits for its next item.
_PAUSE_SECONDS = 0.05
_POLL_SECONDS = 0.5

_KEPT_FLOW_RUNS = 100
_related: dict[tuple[Any, ...], list[RelatedResource]] = {}


@cache
def poll_queues() -> None:
    """Have Prefect's sending services poll their queues while items arrive, up to 50 ms later each.

    Why: of an empty queue the next item is taken by another thread, four switches of the interpreter lock for each of a
    task run's three events and its log line: at no-op tasks the queue is always empty.
    Watch: `_QueueServiceBase._get_item`.
    Delete when: the benchmark `task_runner --rows map-1000` is as fast without it.
    """
    take: Any = _QueueServiceBase._get_item

    async def take_after_polling(self: _QueueServiceBase[Any], timeout: float | None = None) -> Any:  # noqa: ASYNC109 - as it is called
        began, waited = time.monotonic(), 0.0
        limit = _POLL_SECONDS if timeout is None else min(timeout, _POLL_SECONDS)
        while self._queue.empty() and (waited := time.monotonic() - began) < limit:  # noqa: ASYNC110 - threads put items
            await asyncio.sleep(min(_PAUSE_SECONDS, limit - waited))
        return await take(self, timeout if timeout is None else max(timeout - waited, 0.0))

    _QueueServiceBase._get_item = take_after_polling  # type: ignore[method-assign]


@cache
def relate_once() -> None:
    """Have the events service keep what each event of a flow run relates to: its flow, deployment, work pool and tags.

    Why: it builds these objects again for each event, a tenth of a task run's CPU time at no-op tasks.
    Watch: `EventsWorker.attach_related_resources_from_context`.
    Delete when: Prefect caches the related resources, not only the records that they are made of.
    """
    prefect.events.worker.related_resources_from_run_context = _related_to_run  # type: ignore[attr-defined] # it imports it


async def _related_to_run(client: PrefectClient, exclude: set[str] | None = None) -> list[RelatedResource]:
    flow_run: Any = getattr(FlowRunContext.get(), "flow_run", None)
    task_run_context, excluded = TaskRunContext.get(), exclude or set()
    own = {f"prefect.task-run.{task_run_context.task_run.id}"} if task_run_context else set()
    # An event of the author's inside a task relates to the task run as well: that one is not for others.
    if flow_run and own <= excluded:
        # All that Prefect reads of it: a flow run that is run again may have another name, or tags.
        belongs = (flow_run.flow_id, flow_run.deployment_id, flow_run.work_queue_id, flow_run.work_pool_name)
        key = (flow_run.id, flow_run.name, *belongs, *flow_run.tags)
        if key not in _related:
            if len(_related) >= _KEPT_FLOW_RUNS:
                _related.clear()
            _related[key] = await related_resources_from_run_context(client=client, exclude=own)
        if not any(resource.id in excluded for resource in _related[key]):
            return list(_related[key])
    return await related_resources_from_run_context(client=client, exclude=exclude)

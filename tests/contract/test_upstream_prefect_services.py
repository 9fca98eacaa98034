"""Behaviour of Prefect's sending services that `tidepool.upstream.prefect_services` relies on."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import prefect.events.related
import prefect.events.worker
import pytest
from prefect._internal.concurrency.services import BatchedQueueService, QueueService, _QueueServiceBase
from prefect.client.schemas.objects import Flow, FlowRun, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events.related import related_resources_from_run_context

from tests.polling import until
from tidepool.upstream import prefect_services as upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

# --- poll_queues ----------------------------------------------------------------------------------


class _OneByOne(QueueService[int]):
    """Takes items one by one, as the service of events does."""

    seen: list[int]

    async def _handle(self, item: int) -> None:
        self.seen.append(item)


class _InBatches(BatchedQueueService[int]):
    """Takes items in batches, as the service of logs does."""

    _max_batch_size = 1000
    _min_interval = 0.1
    seen: list[int]

    async def _handle_batch(self, items: list[int]) -> None:
        self.seen += items


class _Queue(queue.Queue[Any]):
    """A queue that counts how often a thread waits for its next item."""

    waits = 0

    def get(self, *args: Any, **kwargs: Any) -> Any:
        self.waits += kwargs.get("block", True)
        return super().get(*args, **kwargs)


@pytest.fixture(params=[_OneByOne, _InBatches])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(_QueueServiceBase, "_get_item", _QueueServiceBase._get_item)
    monkeypatch.setattr(queue, "Queue", _Queue)
    upstream.poll_queues.__wrapped__()
    running = request.param.instance()
    assert isinstance(running._queue, _Queue)
    running.seen = []
    yield running
    running.drain()


def test_everything_is_sent_in_order_also_after_a_pause(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_POLL_SECONDS", 0.01)
    for number in range(100):
        service.send(number)
    until(lambda: len(service.seen) == 100)
    time.sleep(0.1)  # longer than the queue is polled
    service.send(100)
    assert until(lambda: service.seen, lambda seen: len(seen) == 101) == list(range(101))


def test_no_thread_waits_for_an_item_while_items_arrive(service: Any) -> None:
    service.send(-1)
    until(lambda: service.seen)
    before = service._queue.waits
    for number in range(50):
        service.send(number)
        time.sleep(0.002)  # as far apart as a worker's task runs
    until(lambda: len(service.seen) == 51)
    assert service._queue.waits - before < 15  # one per batch; without polling one per item


def test_a_batch_is_sent_when_its_interval_is_over_although_more_comes(service: Any) -> None:
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.02):
            service.send(0)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        until(lambda: service.seen, seconds=20)
    finally:
        stop.set()
        sender.join()


def test_draining_sends_what_is_left(service: Any) -> None:
    for number in range(100):
        service.send(number)
    service.drain()
    assert service.seen == list(range(100))


# --- relate_once ----------------------------------------------------------------------------------


class _Api:
    """The part of Prefect's client that is asked what a flow run belongs to."""

    asked = 0

    async def read_flow(self, flow_id: Any) -> Flow:
        self.asked += 1
        return Flow(id=flow_id, name="a flow", tags=["of-flow"])


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_related", {})
    monkeypatch.setattr(prefect.events.related, "RESOURCE_CACHE", {})


def _flow_run() -> FlowRun:
    return FlowRun(id=uuid4(), flow_id=uuid4(), name="a-run", tags=["of-run"])


def _related(how: Any, api: Any, exclude: set[str]) -> list[dict[str, str]]:
    return [dict(resource) for resource in asyncio.run(how(client=api, exclude=exclude))]


@pytest.mark.parametrize("excluded", ["nothing", "its own", "its own and the flow run", "its own and a tag"])
@pytest.mark.parametrize("in_task_run", [True, False])
def test_an_event_relates_to_what_prefect_says(excluded: str, *, in_task_run: bool) -> None:
    flow_run = _flow_run()
    task_run = TaskRun(id=uuid4(), flow_run_id=flow_run.id, task_key="t", dynamic_key="0", name="t-0", tags=["of-task"])
    own = f"prefect.task-run.{task_run.id}"
    exclude = {
        "nothing": set(),
        "its own": {own},
        "its own and the flow run": {own, f"prefect.flow-run.{flow_run.id}"},
        "its own and a tag": {own, "prefect.tag.of-flow"},
    }[excluded]

    def check() -> None:
        for _ in range(3):
            ours = _related(upstream._related_to_run, _Api(), exclude)
            assert ours == _related(related_resources_from_run_context, _Api(), exclude)
            assert ours

    with FlowRunContext.model_construct(flow_run=flow_run):
        if in_task_run:
            with TaskRunContext.model_construct(task_run=task_run):
                check()
        else:
            check()


def test_what_an_event_relates_to_is_looked_up_once_and_not_shared() -> None:
    api: Any = _Api()

    async def twice() -> None:
        (await upstream._related_to_run(api, set())).clear()
        assert len(await upstream._related_to_run(api, set())) == 4

    with FlowRunContext.model_construct(flow_run=_flow_run()):
        asyncio.run(twice())
    assert api.asked == 1


@pytest.mark.parametrize("change", [{"name": "b-run"}, {"tags": ["again"]}])
def test_a_flow_run_that_runs_again_relates_to_what_it_has_then(change: dict[str, Any]) -> None:
    flow_run = _flow_run()
    found = []
    for run in (flow_run, flow_run.model_copy(update=change)):
        with FlowRunContext.model_construct(flow_run=run):
            found.append(_related(upstream._related_to_run, _Api(), set()))
    assert found[0] != found[1]


def test_an_event_outside_of_a_run_relates_to_nothing() -> None:
    assert _related(upstream._related_to_run, _Api(), set()) == []


def test_the_events_service_asks_the_replaced_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect.events.worker, "related_resources_from_run_context", None)
    upstream.relate_once.__wrapped__()
    assert prefect.events.worker.related_resources_from_run_context is upstream._related_to_run  # type: ignore[attr-defined]
    event = prefect.events.Event(
        event="tidepool.test", resource=prefect.events.Resource({"prefect.resource.id": "tidepool.test"})
    )
    service: Any = prefect.events.worker.EventsWorker.__new__(prefect.events.worker.EventsWorker)
    service._orchestration_client = _Api()
    with FlowRunContext.model_construct(flow_run=_flow_run()):
        asyncio.run(service.attach_related_resources_from_context(event))
    assert len(event.related) == 4


def test_what_was_looked_up_for_old_flow_runs_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_KEPT_FLOW_RUNS", 2)
    for _ in range(5):
        with FlowRunContext.model_construct(flow_run=_flow_run()):
            _related(upstream._related_to_run, _Api(), set())
        assert len(upstream._related) <= 2

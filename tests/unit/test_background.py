"""Prefect's sending services and its console, in a Dask worker."""

from __future__ import annotations

import io
import logging
import time
from typing import TYPE_CHECKING, Any

import pytest
from prefect._internal.concurrency.services import BatchedQueueService, QueueService
from prefect.logging.handlers import PrefectConsoleHandler

from tidepool.compute import background

if TYPE_CHECKING:
    from collections.abc import Iterator


class OneByOne(QueueService[int]):
    """Takes items one by one, as the service of events does."""

    seen: list[int]

    async def _handle(self, item: int) -> None:
        self.seen.append(item)


class InBatches(BatchedQueueService[int]):
    """Takes items in batches, as the service of logs does."""

    _max_batch_size = 1000
    _min_interval = 0.1
    seen: list[int]

    async def _handle_batch(self, items: list[int]) -> None:
        self.seen += items


@pytest.fixture(params=[OneByOne, InBatches])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(background, "_SERVICES", (request.param,))
    running = request.param.instance()
    running.seen = []
    background.gather_what_is_sent()
    background.gather_what_is_sent()
    yield running
    running.drain()


def _until_seen(service: Any, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(service.seen) < count:
        assert time.monotonic() < deadline, service.seen
        time.sleep(0.01)


def test_everything_is_sent_in_order_also_after_a_pause(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_PAUSE_SECONDS", 0.001)
    for number in range(100):
        service.send(number)
    _until_seen(service, 100)
    woken = service._queue_get_thread._thread._submitted_count
    deadline = time.monotonic() + 20
    # One that has an interval looks until that is over, and then again.
    while isinstance(service, OneByOne) and service._queue_get_thread._thread._submitted_count == woken:
        assert time.monotonic() < deadline, "the thread does not wait for what comes after a pause"
        time.sleep(0.01)
    service.send(100)
    _until_seen(service, 101)
    assert service.seen == list(range(101))


def test_the_thread_is_not_woken_for_each_item(service: Any) -> None:
    service.send(0)  # the thread that waited from the start takes it
    _until_seen(service, 1)
    woken = service._queue_get_thread._thread._submitted_count
    for number in range(1, 100):
        service.send(number)
    _until_seen(service, 100)
    assert service._queue_get_thread._thread._submitted_count - woken <= 1


def test_a_batch_is_sent_when_its_interval_is_over_although_more_comes(service: Any) -> None:
    """Lines that came less than half a second apart made one batch of megabytes, shown an hour later."""
    deadline = time.monotonic() + 20
    sent = 0
    while not service.seen:
        service.send(sent)
        sent += 1
        assert time.monotonic() < deadline, f"{sent} items wait"
        time.sleep(0.02)
    assert sent < 100


def test_draining_sends_what_is_left(service: Any) -> None:
    for number in range(100):
        service.send(number)
    service.drain()
    assert service.seen == list(range(100))
    service._queue_get_thread._thread.thread.join(20)
    assert not service._queue_get_thread._thread.thread.is_alive()


@pytest.fixture
def handler() -> Iterator[PrefectConsoleHandler]:
    logger = logging.getLogger("tidepool.test-background")
    logger.propagate = False
    added = PrefectConsoleHandler(stream=io.StringIO())
    added.setFormatter(logging.Formatter("%(levelname)s | %(message)s"))
    logger.addHandler(added)
    yield added
    logger.removeHandler(added)


LINE = "Finished in state Completed() :smile: [red]not markup[/red] " + "long " * 60


def test_lines_are_printed_as_they_are(handler: PrefectConsoleHandler) -> None:
    background.print_plainly()
    logging.getLogger("tidepool.test-background").warning(LINE)
    assert isinstance(handler.console, background._Plain)
    assert handler.stream.getvalue() == f"WARNING | {LINE}\n"


def test_a_terminal_keeps_its_colours(handler: PrefectConsoleHandler) -> None:
    handler.console._force_terminal = True
    background.print_plainly()
    assert not isinstance(handler.console, background._Plain)

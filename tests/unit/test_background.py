"""Prefect's sending services and its console, in a Dask worker."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import prefect.events.related
import pytest
from prefect._internal.concurrency.services import BatchedQueueService, QueueService
from prefect.client.schemas.objects import Flow, FlowRun, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.filesystems import LocalFileSystem
from prefect.logging.handlers import PrefectConsoleHandler

from tidepool.compute.worker import background

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


# --- what an event relates to ----------------------------------------------------------------------


class Api:
    """The part of Prefect's client that is asked what a flow run belongs to."""

    asked = 0

    async def read_flow(self, flow_id: Any) -> Flow:
        self.asked += 1
        return Flow(id=flow_id, name="a flow", tags=["of-flow"])


def _flow_run() -> FlowRun:
    return FlowRun(id=uuid4(), flow_id=uuid4(), name="a-run", tags=["of-run"])


def _task_run(flow_run: FlowRun) -> TaskRun:
    return TaskRun(id=uuid4(), flow_run_id=flow_run.id, task_key="t", dynamic_key="0", name="t-0", tags=["of-task"])


@pytest.mark.parametrize("excluded", ["nothing", "its own", "its own and the flow run", "its own and a tag"])
@pytest.mark.parametrize("where", ["task run", "flow run"])
def test_an_event_relates_to_what_prefect_says(excluded: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect.events.related, "RESOURCE_CACHE", {})
    flow_run = _flow_run()
    task_run = _task_run(flow_run)
    own = f"prefect.task-run.{task_run.id}"
    exclude = {
        "nothing": set(),
        "its own": {own},
        "its own and the flow run": {own, f"prefect.flow-run.{flow_run.id}"},
        "its own and a tag": {own, "prefect.tag.of-flow"},
    }[excluded]

    async def related(how: Any, api: Api) -> list[dict[str, str]]:
        return [dict(resource) for resource in await how(client=api, exclude=exclude)]

    async def both() -> None:
        for _ in range(3):
            ours = await related(background._related, api := Api())
            assert ours == await related(prefect.events.related.related_resources_from_run_context, api)
            assert ours

    task_context: Any = TaskRunContext.model_construct(task_run=task_run) if where == "task run" else None
    with FlowRunContext.model_construct(flow_run=flow_run):
        if task_context:
            with task_context:
                asyncio.run(both())
        else:
            asyncio.run(both())


def test_what_an_event_relates_to_is_found_out_once_and_never_shared() -> None:
    api, flow_run = Api(), _flow_run()

    async def twice() -> None:
        first = await background._related(api, set())  # type: ignore[arg-type]
        first.clear()
        assert len(await background._related(api, set())) == 4  # type: ignore[arg-type]

    with FlowRunContext.model_construct(flow_run=flow_run):
        asyncio.run(twice())
    assert api.asked == 1


@pytest.mark.parametrize("change", [{"name": "b-run"}, {"tags": ["again"]}])
def test_a_flow_run_that_is_run_again_is_related_to_what_it_has_then(change: dict[str, Any]) -> None:
    flow_run, names = _flow_run(), []
    for run in (flow_run, flow_run.model_copy(update=change)):
        with FlowRunContext.model_construct(flow_run=run):
            related = asyncio.run(background._related(Api(), set()))  # type: ignore[arg-type]
            names.append([dict(resource) for resource in related])
    assert names[0] != names[1]


def test_an_event_outside_of_a_run_relates_to_nothing() -> None:
    assert asyncio.run(background._related(Api(), set())) == []  # type: ignore[arg-type]


def test_what_was_found_out_of_old_flow_runs_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[Any, Any] = {}
    monkeypatch.setattr(background, "_related_to", kept)
    monkeypatch.setattr(background, "_KEPT_FLOW_RUNS", 2)
    for _ in range(5):
        with FlowRunContext.model_construct(flow_run=_flow_run()):
            asyncio.run(background._related(Api(), set()))  # type: ignore[arg-type]
        assert len(kept) <= 2


# --- where results are ------------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "real" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "file").touch()
    (tmp_path / "real" / "to-file").symlink_to(tmp_path / "real" / "file")
    (tmp_path / "real" / "outside").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


PATHS = [
    None,
    "",
    "file",
    "not-there",
    "to-file",
    "outside",
    "folder/file",
    "folder/",
    ".",
    "..",
    "../real",
    "~",
    "~/real/x",
]


@pytest.mark.parametrize("path", [*PATHS, "{base}/file", "/etc/passwd", "x" * 300, Path("file"), Path("..")])
@pytest.mark.parametrize("base", [None, "real", "link", "../real", "."])
def test_a_path_is_resolved_as_prefect_does(storage: Path, base: str | None, path: Any) -> None:
    basepath = str(storage / base) if base in {"real", "link"} else base
    files: Any = SimpleNamespace(basepath=basepath)
    given = path.format(base=basepath or storage / "real") if isinstance(path, str) else path

    def resolved(how: Any) -> Any:
        try:
            return how(files, given)
        except ValueError as refused:
            return str(refused)

    for _ in range(2):
        assert resolved(background._resolve_path) == resolved(background._prefects_resolve_path)


def test_a_path_follows_the_current_folder(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: Any = SimpleNamespace(basepath=None)
    assert background._resolve_path(files, "x") == storage / "real" / "x"
    monkeypatch.chdir(storage / "real" / "folder")
    assert background._resolve_path(files, "x") == storage / "real" / "folder" / "x"


def test_result_storage_resolves_that_way(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalFileSystem, "_resolve_path", background._prefects_resolve_path)
    background.resolve_once()
    files = LocalFileSystem(basepath=str(storage / "link"))
    files.write_path("key", b"result")
    assert (storage / "real" / "key").read_bytes() == files.read_path("key") == b"result"

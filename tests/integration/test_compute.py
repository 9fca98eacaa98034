"""Where mapped tasks run, by setting: processes, threads, an existing scheduler."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

import pytest
from prefect import flow, task
from prefect.context import FlowRunContext

from tests.polling import until
from tidepool import settings as settings_module
from tidepool.compute import dask_client, dask_runner
from tidepool.compute.clusters.local import local_cluster
from tidepool.compute.clusters.preload.local_worker import NICENESS
from tidepool.compute.progress import ItemProgress
from tidepool.errors import UsageError
from tidepool.settings import SizeSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets `TIDEPOOL_*` variables for one test."""

    def set_(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"TIDEPOOL_{name}", value)
        settings_module.settings.cache_clear()

    yield set_
    settings_module.settings.cache_clear()


@task
def where(_item: int) -> tuple[int, str, int]:
    """The process, the thread and the niceness that it runs at."""
    return os.getpid(), threading.current_thread().name, os.getpriority(os.PRIO_PROCESS, 0)


@flow(task_runner=dask_runner("small"))
def mapped() -> list[tuple[int, str, int]]:
    return where.map(range(4)).result()


@flow(task_runner=dask_runner("small"))
def called() -> tuple[int, str, int]:
    return where(1)


def square(number: int) -> int:
    return number * number


def test_local_runs_mapped_tasks_in_other_processes_at_a_lower_priority(use: Callable[..., None]) -> None:
    use(COMPUTE_PROVIDER="local")
    here = os.getpriority(os.PRIO_PROCESS, 0)
    found = mapped()
    assert os.getpid() not in {pid for pid, _, _ in found}
    assert {niceness for _, _, niceness in found} == {here + NICENESS}


def test_what_threads_log_at_the_end_of_an_item_goes_to_the_runs_server(
    use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread alone, without the run's context, the log began a server of its own once."""
    seen = []
    monkeypatch.setattr(ItemProgress, "show", lambda _: seen.append(FlowRunContext.get()))
    use(COMPUTE_PROVIDER="threads")

    @task
    def one(number: int) -> int:
        return number

    @flow(task_runner=dask_runner("small"))
    def two() -> None:
        one.map([1, 2]).wait()

    two()
    until(lambda: len(seen) == 2)
    assert all(seen)


def test_threads_runs_mapped_tasks_in_this_process_at_its_priority(use: Callable[..., None]) -> None:
    use(COMPUTE_PROVIDER="threads")
    here = os.getpriority(os.PRIO_PROCESS, 0)
    assert {(pid, niceness) for pid, _, niceness in mapped()} == {(os.getpid(), here)}


def test_address_uses_the_scheduler_that_is_there_and_leaves_it(use: Callable[..., None]) -> None:
    with local_cluster(SizeSettings(workers=1)) as cluster:
        use(COMPUTE_PROVIDER="address", COMPUTE_ADDRESS=cluster.scheduler_address)
        pids = {pid for pid, _, _ in mapped()}
        with dask_client() as client:
            assert set(client.run(os.getpid).values()) == pids
        assert cluster.status.name == "running"


def test_address_without_an_address_names_the_setting(use: Callable[..., None]) -> None:
    use(COMPUTE_PROVIDER="address")
    with pytest.raises(UsageError, match="TIDEPOOL_COMPUTE_ADDRESS is empty: give tcp://host:8786"):
        mapped()
    with pytest.raises(UsageError, match="TIDEPOOL_COMPUTE_ADDRESS is empty"), dask_client():
        pass


def test_a_run_that_maps_nothing_starts_no_cluster(use: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    use(COMPUTE_PROVIDER="local")
    with caplog.at_level(logging.INFO):
        pid, _, _ = called()
    assert pid == os.getpid()
    assert "cluster" not in caplog.text.lower()


@pytest.mark.parametrize("provider", ["local", "threads"])
def test_a_client_lives_for_its_block(
    provider: str, use: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    use(COMPUTE_PROVIDER=provider)
    with caplog.at_level(logging.INFO):
        with dask_client("small", workers=1) as client:
            assert client.submit(square, 7).result() == 49
            pids = set(client.run(os.getpid).values())
        assert client.status == "closed"
    assert len(pids) == 1
    assert (pids == {os.getpid()}) == (provider == "threads")
    steps = [record.message for record in caplog.records if record.message.startswith("Dask cluster")]
    assert [step.rsplit(": ", 1)[-1].split(" ")[0] for step in steps] == ["1", "closing", "closed"]


@task
def with_a_client(number: int) -> int:
    """A Dask cluster inside a mapped task."""
    with dask_client("small", workers=1) as client:
        return client.submit(square, number).result()


@flow(task_runner=dask_runner("small"))
def mapped_clients() -> list[int]:
    return with_a_client.map([7]).result()


@pytest.mark.parametrize("provider", ["local", "threads"])
def test_a_mapped_task_may_have_a_client(provider: str, use: Callable[..., None]) -> None:
    """`daemonic processes are not allowed to have children`."""
    use(COMPUTE_PROVIDER=provider)
    assert mapped_clients() == [49]


def test_an_unknown_size_fails_when_the_run_begins(use: Callable[..., None]) -> None:
    use(COMPUTE_PROVIDER="threads")
    with pytest.raises(UsageError, match="unknown size 'huge'"):
        mapped.with_options(task_runner=dask_runner("huge"))()


def test_the_stand_in_runs_nothing_itself() -> None:
    with pytest.raises(RuntimeError, match="Prefect calls duplicate"):
        dask_runner().submit(where, {"_item": 1})

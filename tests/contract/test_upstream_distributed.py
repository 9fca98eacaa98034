"""Behaviour of distributed that the task runner relies on: its events, and what `upstream.distributed` wraps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import distributed
import pytest
from distributed import KilledWorker
from distributed.client import FutureCancelledError

from tests.contract.releases import assert_checked
from tests.polling import until
from tidepool.compute.clusters.local import set_dask_defaults
from tidepool.compute.runner.worker_loss import EXIT_TOPIC, MEMORY_TOPIC, ReportingNanny
from tidepool.upstream.distributed import PersistentNanny, WorkerSlot, call_whenever_done

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from distributed import Client

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def cluster() -> Iterator[distributed.LocalCluster]:
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        worker_class=ReportingNanny,
        scheduler_kwargs={"allowed_failures": 0},
        memory_limit="500MiB",
        dashboard_address="127.0.0.1:0",
    ) as running:
        yield running


@pytest.fixture
def client(cluster: distributed.LocalCluster) -> Iterator[Client]:
    cluster.wait_for_workers(1, timeout=60)
    with distributed.Client(cluster, set_as_default=False) as connected:
        yield connected


def test_the_release_was_checked() -> None:
    assert_checked("distributed", ">=2026.8,<2026.9")


def _lend(gates: list[str], *, awaited: bool) -> tuple[int, list[str]]:
    """Leave the place, by another thread, and take it back when it is free; then the order of what happened."""
    slot = WorkerSlot()
    open_: list[int] = [1]
    slot.awaited.append(open_)
    left, over = (distributed.Event(name) for name in gates)
    helper = threading.Thread(target=slot.leave)
    helper.start()
    helper.join()
    slot.leave()  # once is enough
    left.set()
    over.wait()
    if not awaited:
        open_.clear()
    slot.take_back()
    slot.close()
    return slot.priority, [threading.current_thread().name]


def _borrow(gates: list[str]) -> str:
    left, over = (distributed.Event(name) for name in gates)
    left.wait()
    over.set()
    return threading.current_thread().name


@pytest.mark.parametrize("awaited", [False, True])
def test_a_task_lends_its_place_to_another_one(client: Client, *, awaited: bool) -> None:
    """The worker has one thread: without the loan the second task would never begin."""
    gates = [f"left-{awaited}", f"over-{awaited}"]
    lender = client.submit(_lend, gates, awaited=awaited, priority=3, pure=False)
    borrower = client.submit(_borrow, gates, pure=False)
    priority, (lender_thread,) = lender.result(timeout=60)
    assert priority == 3
    assert borrower.result(timeout=60) != lender_thread
    # One thread is left: the borrower's has ended for the lender's, or the lender's because it did not come back.
    assert client.submit(_threads, pure=False).result(timeout=60) == 1


def _threads() -> int:
    executor = distributed.get_worker().executors["default"]
    return len(executor._threads)


def test_a_callback_is_called_each_time_a_future_is_done(client: Client) -> None:
    called = threading.Semaphore(0)
    gate = distributed.Event("gate", client=client)
    # The task takes the gate's name: an event itself would make it depend on a client.
    future = client.submit(_wait_for_gate, pure=False)
    client.loop.add_callback(call_whenever_done, future, called.release)
    assert not called.acquire(timeout=0.2)
    gate.set()
    assert called.acquire(timeout=30)
    client.retry([future])
    assert called.acquire(timeout=30), "not called for the second computation"
    # Of a future that is done: at once.
    client.loop.add_callback(call_whenever_done, future, called.release)
    assert called.acquire(timeout=30)


def _wait_for_gate() -> int:
    distributed.Event("gate").wait(timeout=30)
    return 1


def _die(way: str) -> None:
    if way == "memory":
        hoard = []
        while True:
            hoard.append(os.urandom(1) * 20_000_000)
            time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("way", "topic"), [("kill", EXIT_TOPIC), ("memory", MEMORY_TOPIC)])
def test_a_lost_worker_is_reported_with_its_task_and_its_exit(client: Client, way: str, topic: str) -> None:
    reported: list[dict[str, Any]] = []
    everything: list[dict[str, Any]] = []
    client.subscribe_topic(topic, lambda event: reported.append(event[1]))
    client.subscribe_topic("all", lambda event: everything.append(event[1]))
    worker = next(iter(client.scheduler_info()["workers"]))
    future = client.submit(_die, way, pure=False)
    with pytest.raises(KilledWorker) as raised:
        future.result(timeout=60)
    assert (raised.value.task, raised.value.last_worker.address) == (future.key, worker)
    assert raised.value.allowed_failures == 0
    until(lambda: reported, seconds=30)
    assert reported[0]["worker"] == worker
    if topic == EXIT_TOPIC:
        assert reported[0]["exitcode"] == -signal.SIGKILL
    until(lambda: [each for each in everything if each["action"] == "remove-worker"], seconds=30)
    removed = next(each for each in everything if each["action"] == "remove-worker")
    assert (removed["worker"], removed["expected"]) == (worker, False)
    # The nanny brings the worker back.
    until(lambda: [each for each in client.scheduler_info()["workers"] if each != worker], seconds=60)


def test_a_nanny_survives_a_restart_that_fails() -> None:
    """A task that kills each process as soon as it answers the scheduler took the nanny with it."""
    set_dask_defaults(300)
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            worker_class=PersistentNanny,
            scheduler_kwargs={"allowed_failures": 6},
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        future = client.submit(_die, "kill", pure=False)
        with pytest.raises(KilledWorker):
            future.result(timeout=120)
        cluster.wait_for_workers(1, timeout=60)
        assert client.submit(int, "5").result(timeout=30) == 5


WITHOUT_GUARD = """
import distributed
from tidepool.upstream.distributed import start_workers_without_main
print("main")
start_workers_without_main()
with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
    with distributed.Client(cluster) as client:
        print(client.submit(lambda: hasattr(__import__("__main__"), "distributed")).result())
"""


def test_a_worker_starts_without_the_main_module(tmp_path: Path) -> None:
    """With it, this script would run again in the worker, and again in each one that follows."""
    (tmp_path / "script.py").write_text(WITHOUT_GUARD)
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert (done.stdout, done.returncode) == ("main\nFalse\n", 0), done.stderr


def test_futures_are_cancelled_with_a_reason_when_the_scheduler_is_gone() -> None:
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        client = distributed.Client(cluster.scheduler_address, set_as_default=False, timeout=2)
        future = client.submit(_wait_for_gate, pure=False)
    try:
        with pytest.raises(FutureCancelledError) as raised:
            future.result(timeout=60)
        assert raised.value.reason == "scheduler-connection-lost"
    finally:
        client.close()


def test_the_scheduler_keeps_metadata_by_path(client: Client) -> None:
    """`submission.Publisher` writes it, `worker.entry.forget` removes it."""
    client.set_metadata(["tidepool-test", "0"], b"x")
    assert client.get_metadata(["tidepool-test", "0"]) == b"x"
    assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.task_metadata.pop("tidepool-test")) == {
        "0": b"x"
    }

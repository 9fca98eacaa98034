"""Flows whose mapped items each leave an object in the store, and which harm themselves when a parameter asks for it.

The store is the memory of a trial: `chaos/<run>/items/<item>/<random>` for each time that an item was done, and
`chaos/<run>/fault` from the moment in which the fault begins.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from uuid import uuid4

from prefect import flow, task
from prefect.runtime import flow_run

from tidepool import storage
from tidepool.compute import dask_runner
from tidepool.compute.batches import map_batched

# The item that harms its worker, and the number of items that the driver waits for before it harms itself: by then all
# workers compute.
HARMFUL = 6


def begin_fault(run: str) -> bool:
    """Note that the fault begins now; return whether it is the first time."""
    first = not storage.exists(f"chaos/{run}/fault")
    if first:
        storage.write(f"chaos/{run}/fault", b"1")
    return first


def hang_in_c() -> None:
    """Hold the GIL for ten minutes: no thread of this process runs, and no signal handler."""
    ctypes.PyDLL(None).sleep(600)


def exhaust_memory() -> None:
    """Allocate memory until the kernel ends this process."""
    hoard = []
    while True:
        hoard.append(b"x" * 20_000_000)
        time.sleep(0.01)


def fill_disk() -> None:
    """Write to the pod's /tmp, beyond its limit, until the kubelet evicts the pod."""
    block = b"x" * 10_000_000
    with Path("/tmp/chaos").open("wb") as file:
        while True:
            file.write(block)
            file.flush()
            time.sleep(0.05)


def harm_worker(fault: str, run: str, number: int) -> None:
    """Do to this process what the fault says."""
    if fault == "worker-hung":
        if number >= HARMFUL:
            begin_fault(run)
            hang_in_c()
    elif number != HARMFUL:
        return
    elif fault == "worker-poisoned":
        begin_fault(run)
        os.kill(os.getpid(), signal.SIGKILL)
    elif begin_fault(run):
        {"worker-oom": exhaust_memory, "worker-disk": fill_disk}[fault]()


# The retries that `tidepool new` writes.
@task(retries=2, retry_delay_seconds=10, retry_condition_fn=storage.retry_transient_errors)
def item(number: int, run: str, seconds: float, fault: str) -> int:
    """Compute for so many seconds, then leave an object."""
    if fault.startswith("worker-"):
        harm_worker(fault, run, number)
    time.sleep(seconds)
    storage.write(f"chaos/{run}/items/{number}/{uuid4().hex}", b"1")
    return number


def harm_driver(fault: str, run: str) -> None:
    """Do to this process what the fault says."""
    begin_fault(run)
    {"driver-oom": exhaust_memory, "driver-hung": hang_in_c}[fault]()


def mapped(count: int, seconds: float, fault: str, *, keep: bool = False) -> int:
    """Map so many items; return their number."""
    run = str(flow_run.id)
    if keep:
        storage.keep_results()
    futures = item.with_options(persist_result=keep or None).map(range(count), run, seconds, fault)
    if fault.startswith("driver-"):
        for future in futures[:HARMFUL]:
            future.result()
        harm_driver(fault, run)
    return len(futures.result())


@flow(name="chaos-flows-items", task_runner=dask_runner("small", start_early=True))
def items(count: int = 30, seconds: float = 1.0, fault: str = "", keep: bool = False) -> int:  # noqa: FBT001, FBT002
    """Map items on a Dask cluster of this run's own."""
    return mapped(count, seconds, fault, keep=keep)


@task
def leave(number: int, run: str) -> int:
    """Leave an object."""
    storage.write(f"chaos/{run}/items/{number}/{uuid4().hex}", b"1")
    return number


@flow(name="chaos-flows-batches", task_runner=dask_runner("small", start_early=True))
def batches(count: int = 10_000) -> int:
    """Map items in batches on a Dask cluster of this run's own."""
    return len(map_batched(leave, range(count), run=str(flow_run.id)))

"""One measurement of the task runner benchmark, in a process of its own: prints one line of JSON.

`python -m benchmarks.task_runner_flows RUNNER KIND ITEMS`
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import distributed
import psutil
from prefect import flow, task
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import ThreadPoolTaskRunner
from prefect_dask import DaskTaskRunner

from benchmarks.servers import Server
from tidepool.compute.batches import map_batched
from tidepool.compute.clusters.kubernetes import certificate
from tidepool.compute.runner.task_runner import TidepoolTaskRunner

WORKERS = 2
BATCH = 100
PAUSE_SECONDS = 0.005
WARM_UP = 20 * WORKERS
SETTLE_SECONDS = 4.0

CLUSTER = {"n_workers": WORKERS, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}


def _tls() -> dict[str, Any]:
    """Return a cluster whose parts speak TLS with one key, as pods do."""
    given = certificate.own().security().get_tls_config_for_role("client")
    roles = ("client", "scheduler", "worker")
    files = {f"tls_{role}_{part}": given[part] for role in roles for part in ("cert", "key")}
    security = distributed.Security(require_encryption=True, tls_ca_file=given["ca_file"], **files)
    return {**CLUSTER, "protocol": "tls", "security": security}


# A line of its own among what Prefect prints.
MARK = "MEASURED "


@task
def no_op(item: int) -> int:
    """Do nothing: the time is the cost of a task run."""
    return item


@task
def pause(item: int) -> int:
    """Take 5 ms without using a core."""
    time.sleep(PAUSE_SECONDS)
    return item


def _cpu_seconds() -> float:
    """CPU time of driver, scheduler and workers so far; unlike the time, it hardly depends on what else runs."""
    me = psutil.Process()
    times = [each.cpu_times() for each in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _peak_mib() -> float:
    """Most memory of this process so far; `ru_maxrss` begins with that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index] # Linux has it


def fibonacci(number: int) -> int:
    """Keep a core busy: of 27, for about a tenth of a second."""
    return number if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)


def plain_busy(item: int) -> int:
    """Use a core for a while, without Prefect."""
    fibonacci(27)
    return item


busy = task(plain_busy)


def _pause_seconds() -> float:
    """How long such an item takes: a sleep is never shorter than asked for."""
    each = []
    for _ in range(50):
        begun = time.perf_counter()
        time.sleep(PAUSE_SECONDS)
        each.append(time.perf_counter() - begun)
    return statistics.median(each)


def plain_no_op(item: int) -> int:
    """Do nothing, without Prefect."""
    return item


def _flow(runner: Any, kind: str, items: int) -> dict[str, Any]:
    entered = time.perf_counter()

    @flow(task_runner=runner, name=f"bench-{kind}")
    def bench() -> dict[str, Any]:
        begun = time.perf_counter()
        first = no_op.map(range(WORKERS)).result()
        assert first == list(range(WORKERS))
        first_task = time.perf_counter() - begun
        # Every worker has had its first one, and the server has done what it does after its start: the same for all.
        pause.map(range(WARM_UP)).result()
        time.sleep(SETTLE_SECONDS)
        warm, cpu = time.perf_counter(), _cpu_seconds()
        if kind == "batched":
            results = map_batched(no_op, range(items), batch_size=BATCH)
        elif kind == "auto":
            results = map_batched(pause, range(items))
        elif kind in {"sequential", "sequential-busy"}:
            each = busy if kind == "sequential-busy" else no_op
            results = [each.submit(item).result() for item in range(items)]
        elif kind in {"map", "recorded"}:
            results = no_op.map(range(items)).result()
        else:
            results = list(range(items))
        if kind == "recorded":
            # What is lost shows again after the flow.
            Server(PREFECT_API_URL.value(), []).catch_up(str(flow_run.id), WORKERS + WARM_UP + items)
        done = time.perf_counter()
        assert results == list(range(items))
        # How many `auto` makes is its own choice; at least those by which it measures.
        runs = {"batched": -(-items // BATCH), "cold": 0, "auto": 12}.get(kind, items) + WORKERS + WARM_UP
        return {
            "item_seconds": _pause_seconds() if kind == "auto" else 0.0,
            "flow_run_id": str(flow_run.id),
            "task_runs": runs,
            "first_task_seconds": first_task,
            "seconds": done - warm,
            "cpu_seconds": _cpu_seconds() - cpu,
        }

    measured: dict[str, Any] = bench()
    return {**measured, "flow_seconds": time.perf_counter() - entered - SETTLE_SECONDS}


def _raw(kind: str, items: int, options: dict[str, Any]) -> dict[str, Any]:
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        client.gather(client.map(plain_no_op, range(-WARM_UP, 0), pure=False))
        time.sleep(SETTLE_SECONDS)
        begun = time.perf_counter()
        if kind in {"sequential", "sequential-busy"}:
            plain = plain_busy if kind == "sequential-busy" else plain_no_op
            results = [client.submit(plain, item, pure=False).result() for item in range(items)]
        else:
            results = client.gather([client.submit(plain_no_op, item, pure=False) for item in range(items)])
        assert results == list(range(items))
        return {"task_runs": 0, "seconds": time.perf_counter() - begun}


def main() -> None:
    """Measures what the command line says."""
    name, kind, items = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if name in {"dask", "dask-tls"}:
        measured = _raw(kind, items, CLUSTER if name == "dask" else _tls())
    else:
        runner = {
            "stock": lambda: DaskTaskRunner(cluster_kwargs=CLUSTER),
            "tidepool": lambda: TidepoolTaskRunner(cluster_kwargs=CLUSTER),
            "tidepool-tls": lambda: TidepoolTaskRunner(cluster_kwargs=_tls()),
            "threads": lambda: ThreadPoolTaskRunner(max_workers=WORKERS),
        }[name]()
        measured = _flow(runner, kind, items)
    measured["peak_mib"] = _peak_mib()
    print(MARK + json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()

"""The preload modules: of a Dask scheduler on Kubernetes its imports and its plugin; of a worker on this machine."""

from __future__ import annotations

import json
import sys
from subprocess import run
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tidepool.compute.clusters.preload import local_worker
from tidepool.compute.clusters.preload.scheduler import ClusterPlugin

if TYPE_CHECKING:
    import pytest


def test_a_scheduler_imports_neither_prefect_nor_pandas() -> None:
    """That is most of a scheduler's start-up time; `entry` is what it unpickles with each graph."""
    code = (
        "import sys, tidepool.compute.clusters.preload.scheduler, tidepool.compute.worker.entry; "
        "sys.exit(', '.join({'prefect', 'pandas', 'pydantic', 'bokeh'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_a_worker_on_this_machine_yields_to_the_server_and_has_no_breakpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A breakpoint in a process without a terminal read an empty input, and the task failed without a reason."""
    lowered: list[int] = []
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(sys, "breakpointhook", sys.__breakpointhook__)
    monkeypatch.setattr(local_worker.os, "nice", lowered.append)
    worker: Any = None
    local_worker.dask_setup(worker)
    assert lowered == [local_worker.NICENESS]
    assert sys.breakpointhook is not sys.__breakpointhook__


# --- the scheduler's plugin -------------------------------------------------------------------------------------------


def test_only_idle_workers_may_be_closed() -> None:
    scheduler: Any = SimpleNamespace(workers={}, task_prefixes={})
    plugin = ClusterPlugin(scheduler)
    busy: Any = SimpleNamespace(processing={"a task"})
    idle: Any = SimpleNamespace(processing={})
    assert plugin.valid_workers_downscaling(scheduler, [busy, idle]) == [idle]


def test_a_worker_that_left_still_counts() -> None:
    state = SimpleNamespace(
        name="w", nthreads=1, memory_limit=10, metrics={"tidepool": {"memory_peak": 7, "cpu_seconds": 2.0}}
    )
    prefix = SimpleNamespace(all_durations={"compute": 1.5})
    scheduler: Any = SimpleNamespace(workers={"tcp://w:1": state}, task_prefixes={"p": prefix})
    plugin = ClusterPlugin(scheduler)
    plugin.add_worker(scheduler, "tcp://w:1")
    scheduler.workers.clear()
    plugin.remove_worker(scheduler, "tcp://w:1", stimulus_id="s")
    told = plugin.usage()
    assert told["busy_seconds"] == 1.5
    assert {**told["workers"][0], "seconds": 1} == {
        "name": "w", "seconds": 1, "threads": 1, "memory_limit": 10, "memory_peak": 7, "cpu_seconds": 2.0,
    }  # fmt: skip
    json.dumps(told)


def test_a_worker_that_sent_nothing_yet_has_used_nothing() -> None:
    state = SimpleNamespace(name="w", nthreads=1, memory_limit=None, metrics=None)
    scheduler: Any = SimpleNamespace(workers={"tcp://w:1": state}, task_prefixes={})
    plugin = ClusterPlugin(scheduler)
    plugin.add_worker(scheduler, "tcp://w:1")
    (told,) = plugin.usage()["workers"]
    assert (told["memory_limit"], told["memory_peak"], told["cpu_seconds"]) == (0, 0, 0)

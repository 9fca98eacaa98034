"""What a flow says when its workers die, stock and ours: `python -m benchmarks.truth`.

Five ways to use futures by three ways to lose a worker, and a lost scheduler; each in a process of its own. Honest is a
run in which no task run is left open, and the flow run is not Completed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prefect import flow, task
from prefect_dask import DaskTaskRunner

from benchmarks.servers import prefect_server
from tidepool.compute.runner.task_runner import TidepoolTaskRunner
from tidepool.settings import environment

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
PATTERNS = ["not collected", "wait", "returned", "result", "wait_for"]
WAYS = ["exit", "SIGKILL", "memory"]
RUNNERS = {"stock": DaskTaskRunner, "tidepool": TidepoolTaskRunner}

_START_SECONDS = 60
# A flow that is still running then hangs.
_SECONDS = 240
# Final states travel as events: the server may have them a little later.
_SETTLE_SECONDS = 20


@task
def die(number: int, way: str) -> int:
    """End the worker process, in the first task run."""
    if number == 0:
        time.sleep(0.3)
        if way == "exit":
            os._exit(7)
        if way == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        hoard = []
        while True:
            hoard.append(b"x" * 20_000_000)
            time.sleep(0.01)
    return number


@task
def after() -> int:
    """Run after the others."""
    return 1


@task
def long(_number: int) -> None:
    """Run while the scheduler dies."""
    time.sleep(30)


def _workers_die(pattern: str, way: str) -> Any:
    futures = die.map(range(3), way)
    if pattern == "not collected":
        time.sleep(2)
        return "done"
    if pattern == "wait":
        futures.wait()
        return "done"
    if pattern == "returned":
        return futures
    if pattern == "result":
        return futures.result()
    return after.submit(wait_for=futures)


def _child(runner: str, pattern: str, way: str) -> None:
    options: dict[str, Any] = {
        "cluster_kwargs": {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "600MiB", "dashboard_address": ":0"}
    }
    if way == "scheduler":
        options = {"address": pattern, "client_kwargs": {"timeout": 5}}

    @flow(name="truth", task_runner=RUNNERS[runner](**options))
    def body() -> Any:
        if way == "scheduler":
            long.map(range(2)).wait()
            return "done"
        return _workers_die(pattern, way)

    print(body(return_state=True).type.value)


def _measure(runner: str, pattern: str, way: str) -> dict[str, Any]:
    with prefect_server("sqlite") as server, tempfile.TemporaryDirectory() as folder, ExitStack() as started:
        variables = {**environment(), "PREFECT_API_URL": server.api, "PREFECT_LOGGING_LEVEL": "ERROR"}
        target, scheduler = pattern, None
        if way == "scheduler":
            announced = Path(folder) / "scheduler.json"
            common = ["--scheduler-file", str(announced), "--no-dashboard"]
            for program in (
                ["dask_scheduler", "--port", "0", "--host", "127.0.0.1"],
                ["dask_worker", "--nthreads", "1"],
            ):
                command = [sys.executable, "-m", f"distributed.cli.{program[0]}", *program[1:], *common]
                process = subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)
                started.callback(_end, process)
                scheduler = scheduler or process
            _until(announced.exists, "the Dask scheduler is there")
            target = json.loads(announced.read_text())["address"]
        begun = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.truth", "--child", runner, target, way],
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started.callback(_end, child)
        if scheduler:
            _until(lambda: "RUNNING" in _states(server.api, "task_runs"), "a task run is Running")
            scheduler.kill()
        try:
            child.wait(_SECONDS)
            ended = "process ended"
        except subprocess.TimeoutExpired:
            _end(child)
            ended = f"hangs after {_SECONDS} s"
        seconds = time.monotonic() - begun
        deadline = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < deadline and {"RUNNING", "PENDING"} & set(_states(server.api, "task_runs")):
            time.sleep(0.5)
        flow_states = _states(server.api, "flow_runs")
        task_states = sorted(_states(server.api, "task_runs", "state_name"))
    closed = not {"Running", "Pending"} & set(task_states)
    recorded = len(task_states) >= (2 if way == "scheduler" else 3)
    return {
        "runner": runner,
        "pattern": "wait" if way == "scheduler" else pattern,
        "way": way,
        "flow": flow_states[0] if flow_states else "-",
        "tasks": task_states,
        "seconds": round(seconds, 1),
        "ended": ended,
        "honest": closed and recorded and flow_states[:1] in (["FAILED"], ["CRASHED"]) and ended == "process ended",
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not reached():
        if time.monotonic() > deadline:
            message = f"Not within {_START_SECONDS} s: {what}"
            raise TimeoutError(message)
        time.sleep(0.2)


def _states(api: str, kind: str, field: str = "state_type") -> list[str]:
    answer = httpx.post(f"{api}/{kind}/filter", json={}, timeout=60)
    answer.raise_for_status()
    return [str(run[field]) for run in answer.json()]


def report(cells: list[dict[str, Any]]) -> str:
    """Render the table as Markdown."""
    lines = ["# Truth after a loss", ""]
    for runner in RUNNERS:
        found = [cell for cell in cells if cell["runner"] == runner]
        lines.append(f"{runner}: honest in {sum(cell['honest'] for cell in found)} of {len(found)}.")
    lines += [
        "",
        "| lost by | futures | runner | flow run | task runs | seconds | honest |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {cell['way']} | {cell['pattern']} | {cell['runner']} | {cell['flow']} | {', '.join(cell['tasks'])} "
        f"| {cell['seconds']} | {'yes' if cell['honest'] else 'no'} |"
        for cell in sorted(cells, key=lambda cell: (cell["way"], cell["pattern"], cell["runner"]))
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, writes and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options.add_argument("--runners", nargs="+", choices=list(RUNNERS), default=list(RUNNERS))
    options.add_argument("--ways", nargs="+", choices=[*WAYS, "scheduler"], default=[*WAYS, "scheduler"])
    options.add_argument("--results", type=Path, default=RESULTS)
    chosen = options.parse_args()
    if chosen.child:
        _child(*chosen.child)
        return
    chosen.results.mkdir(parents=True, exist_ok=True)
    data = chosen.results / "truth.json"
    cells: list[dict[str, Any]] = json.loads(data.read_text()) if data.exists() else []
    for way in chosen.ways:
        for pattern in ["wait"] if way == "scheduler" else PATTERNS:
            for runner in chosen.runners:
                cell = _measure(runner, pattern, way)
                print(f"{way}, {pattern}, {runner}: flow {cell['flow']}, tasks {cell['tasks']}", flush=True)
                key = (cell["runner"], cell["pattern"], cell["way"])
                cells = [one for one in cells if (one["runner"], one["pattern"], one["way"]) != key] + [cell]
                data.write_text(json.dumps(cells, indent=1) + "\n")
    table = report(cells)
    (chosen.results / "truth.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()

"""What the report of a run costs a mapped run, with and without it in turns: `python -m benchmarks.report`.

All flow runs of a number of items are of one process, on one Dask cluster and one server: without, with, without; the
next turn with, without, with. Each is compared with the mean of the two beside it, of its own turn; the two of a turn
that are alike say what the machine does by itself. Without means: nothing is noted of an item, and nothing is written
at the end. Results are added to benchmarks/results/report.json; `--report` only makes the table from it.

A run that fails on purpose at every tenth item has the largest page: its size and time are in the table, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.servers import Server, prefect_server
from benchmarks.task_runner import code
from tidepool.settings import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results"
ITEMS = (200, 1000, 5000)
TURNS = 10
WORKERS = 2
# Of a run: of its mapped part, of its end, of its page.
MOST_SHARE, MOST_SECONDS, MOST_BYTES = 0.02, 0.3, 100 * 1024
_MARK = "MEASURED "
_FAILING = 10
_SECONDS = 3600


# --- one process ------------------------------------------------------------------------------------------------------


class Switch:
    """The report of this process's flow runs, which can be turned off.

    Attributes:
        on: Whether the next flow run has one.
        seconds: How long each took at the end of its run.
    """

    def __init__(self) -> None:
        from tidepool.compute.runner.tracker import Tracker
        from tidepool.report import run_report
        from tidepool.upstream.prefect import follow_flow_runs

        self.on = True
        self.seconds: list[float] = []
        note = Tracker._note

        def noted(tracker: Tracker, *given: Any) -> None:
            if self.on:
                note(tracker, *given)

        def ended(flow_run: Any) -> None:
            if self.on:
                begun = time.perf_counter()
                run_report._ended(flow_run)
                self.seconds.append(time.perf_counter() - begun)

        Tracker._note = noted  # type: ignore[method-assign, assignment] # of this process only
        follow_flow_runs(
            lambda: run_report._begin() if self.on else None,
            lambda state: run_report.explain(state) if self.on else None,
            ended,
        )


def measure(items: int, turns: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of each turn, then those of a run that fails."""
    import distributed
    from prefect import flow, task
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
    from prefect.settings import PREFECT_API_URL

    from tidepool.compute.runner.task_runner import TidepoolTaskRunner

    @task
    def no_op(item: int) -> int:
        """Do nothing: the time is the cost of a task run."""
        return item

    @task
    def failing(item: int) -> int:
        """Fail at some items, as long errors do."""
        if not item % _FAILING:
            raise ValueError(f"item {item}: {'a long reason ' * 20}")
        return item

    def one(runner: Any, *, on: bool, fails: bool = False) -> dict[str, float]:
        switch.on = on
        mapped: list[float] = []

        @flow(task_runner=runner, name="bench-report")
        def bench() -> None:
            begun = time.perf_counter()
            futures = (failing if fails else no_op).map(range(items))
            futures.wait()
            mapped.append(time.perf_counter() - begun)
            futures.result()

        entered = time.perf_counter()
        state: Any = bench(return_state=True)
        seconds = time.perf_counter() - entered
        flow_run = state.state_details.flow_run_id
        # What the server has left to record would be part of the next run.
        completed = items - (len(range(0, items, _FAILING)) if fails else 0)
        if lost := server.catch_up(str(flow_run), completed):
            raise RuntimeError(f"the server has not recorded {lost} of {completed} task runs")
        found = {"mapped_seconds": mapped[0], "seconds": seconds}
        if on:
            # Prefect keeps the exception of a failed run as an artifact without a key.
            only = ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run]), key=ArtifactFilterKey(any_=["bench-report-run"])
            )
            with get_client(sync_client=True) as client:
                (page,) = client.read_artifacts(artifact_filter=only)
            found |= {"end_seconds": switch.seconds[-1], "bytes": len(str(page.data).encode())}
        return found

    switch = Switch()
    server = Server(PREFECT_API_URL.value(), [])
    options = {"n_workers": WORKERS, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}
    with distributed.LocalCluster(**options) as cluster:
        runner = TidepoolTaskRunner(address=cluster.scheduler_address)
        for on in (True, False):  # imports, and the first connections of workers and server
            one(runner, on=on)
        for turn in range(turns):
            inner = not turn % 2
            first, middle, last = (one(runner, on=on) for on in (not inner, inner, not inner))
            yield {"with": [middle] if inner else [first, last], "without": [first, last] if inner else [middle]}
        yield {"failed": one(runner, on=True, fails=True)}


def child(items: int, turns: int) -> None:
    """Print the figures, a line for each turn."""
    for found in measure(items, turns):
        print(_MARK + json.dumps(found), flush=True)


# --- all of them ------------------------------------------------------------------------------------------------------


def measured(items: int, turns: int) -> list[dict[str, Any]]:
    """Measure in a process of its own, against a fresh server."""
    with prefect_server("sqlite") as server, tempfile.TemporaryDirectory() as storage:
        variables = {
            **environment(),
            "PREFECT_API_URL": server.api,
            "TIDEPOOL_STORAGE_ROOT": f"file://{storage}",
            "PREFECT_LOGGING_LEVEL": "WARNING",
        }
        command = [sys.executable, "-m", "benchmarks.report", "--child", str(items), "--turns", str(turns)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=_SECONDS, check=False)
    lines = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or len(lines) != turns + 1:
        raise RuntimeError(f"{items} items failed:\n{done.stderr[-3000:]}")
    about = {"items": items, "at": datetime.now(UTC).isoformat(timespec="seconds"), "code": code()}
    return [{**about, "load": round(os.getloadavg()[0], 1), **json.loads(line)} for line in lines]


def costs(turns: list[dict[str, Any]], figure: str) -> tuple[list[float], list[float]]:
    """Return the share of time that the report costs in each turn, and how far the two runs that are alike differ."""
    shares, noise = [], []
    for each in turns:
        with_, without = ([run[figure] for run in each[name]] for name in ("with", "without"))
        shares.append(statistics.mean(with_) / statistics.mean(without) - 1)
        alike = with_ if len(with_) > 1 else without
        noise.append(alike[1] / alike[0] - 1)
    return shares, noise


def table(records: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# What the report of a run costs",
        "",
        (
            f"`python -m benchmarks.report`: mapped no-op items on {WORKERS} Dask workers, {os.cpu_count()} cores "
            "shared with the server (SQLite), runs with and without the report in turns, in one process. Median of the "
            "turns, lowest and highest. `alike`: how much the second of two equal runs differs from the first. "
            f"Code measured: {', '.join(sorted({each['code'] for each in records}))}."
        ),
        "",
        (
            "| items | turns | the mapped part takes longer by (%) | alike (%) | the end takes longer by (s) "
            "| page (KiB) | of a run with failed items: end (s) | page (KiB) | load |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for items in sorted({each["items"] for each in records}):
        of = [each for each in records if each["items"] == items]
        turns, failed = [each for each in of if "with" in each], [each["failed"] for each in of if "failed" in each]
        shares, noise = costs(turns, "mapped_seconds")
        runs = [run for each in turns for run in each["with"]]
        loads = [each["load"] for each in of]
        cells = [
            _spread([100 * each for each in shares], sign=True),
            _spread([100 * each for each in noise], sign=True),
            _spread([each["end_seconds"] for each in runs]),
            _spread([each["bytes"] / 1024 for each in runs]),
            _spread([each["end_seconds"] for each in failed]),
            _spread([each["bytes"] / 1024 for each in failed]),
        ]
        lines.append(f"| {items:,} | {len(turns)} | {' | '.join(cells)} | {min(loads):.0f}-{max(loads):.0f} |")
    lines += [
        "",
        (
            f"Promised: {100 * MOST_SHARE:.0f} % of the mapped part, {MOST_SECONDS} s at the end, "
            f"{MOST_BYTES // 1024} KiB."
        ),
    ]
    return "\n".join(lines) + "\n"


def _spread(values: list[float], *, sign: bool = False) -> str:
    def short(value: float) -> str:
        return f"{value:+.1f}" if sign else f"{value:.3g}"

    return f"{short(statistics.median(values))} ({short(min(values))} to {short(max(values))})" if values else "-"


def main() -> None:
    """Measures, writes and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--items", nargs="+", type=int, default=list(ITEMS))
    options.add_argument("--turns", type=int, default=TURNS)
    options.add_argument("--report", action="store_true", help="only make the table from what was measured")
    options.add_argument("--child", type=int, metavar="ITEMS", help="measure in this process, for this command itself")
    options.add_argument("--results", type=Path, default=RESULTS)
    chosen = options.parse_args()
    if chosen.child:
        child(chosen.child, chosen.turns)
        return
    data = chosen.results / "report.json"
    records: list[dict[str, Any]] = json.loads(data.read_text()) if data.exists() else []
    for items in [] if chosen.report else chosen.items:
        print(f"{items} items, {chosen.turns} turns", flush=True)
        records += measured(items, chosen.turns)
        data.write_text(json.dumps(records, indent=1) + "\n")
    text = table(records)
    (chosen.results / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

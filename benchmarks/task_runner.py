"""The task runner beside the stock one, Prefect's thread runner and raw Dask: `python -m benchmarks.task_runner`.

Each measurement is a process of its own against a fresh server; the runners take turns, so that what else the machine
does hits all alike. Results are added to benchmarks/results/task_runner.json; the table and the plot are made from it,
so a run may be split (`--rows`, `--repeats`), or only printed (`--report`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.servers import prefect_server
from benchmarks.task_runner_flows import BATCH, MARK, WORKERS
from tidepool.settings import environment

RESULTS = Path(__file__).parent / "results"

# Row: what is run by whom. Stock beyond 1,000 items takes minutes per measurement.
ROWS: dict[str, list[tuple[str, str, int]]] = {
    "map-200": [("stock", "map", 200), ("tidepool", "map", 200), ("threads", "map", 200), ("dask", "map", 200)],
    "map-1000": [("stock", "map", 1000), ("tidepool", "map", 1000), ("threads", "map", 1000), ("dask", "map", 1000)],
    "map-5000": [("tidepool", "map", 5000), ("threads", "map", 5000), ("dask", "map", 5000)],
    "batched-1000": [("tidepool", "batched", 1000)],
    "batched-100000": [("tidepool", "batched", 100_000)],
    "cold": [("stock", "cold", 0), ("tidepool", "cold", 0)],
}

_CATCH_UP_SECONDS = 600
_MEASUREMENT_SECONDS = 900


def measure(database: str, runner: str, kind: str, items: int) -> dict[str, Any]:
    """One measurement: the flow's figures, and the server's CPU time until it has recorded everything."""
    with prefect_server(database) as server:
        before = server.cpu_seconds()
        variables = {**environment(), "PREFECT_API_URL": server.api, "PREFECT_LOGGING_LEVEL": "WARNING"}
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.task_runner_flows", runner, kind, str(items)],
            env=variables,
            capture_output=True,
            text=True,
            timeout=_MEASUREMENT_SECONDS,
            check=False,
        )
        lines = [line for line in child.stdout.splitlines() if line.startswith(MARK)]
        if not lines:
            raise RuntimeError(f"{runner} {kind} {items} failed:\n{child.stderr[-3000:]}")
        measured: dict[str, Any] = json.loads(lines[0].removeprefix(MARK))
        ended = time.monotonic()
        flow_run_id = measured.pop("flow_run_id", None)
        if flow_run_id:
            while server.count_task_runs(flow_run_id) < measured["task_runs"]:
                if time.monotonic() - ended > _CATCH_UP_SECONDS:
                    raise RuntimeError(f"{runner} {kind} {items}: task runs are missing on the server")
                time.sleep(0.5)
            measured["catch_up_seconds"] = time.monotonic() - ended
            measured["server_cpu_seconds"] = server.cpu_seconds() - before
    return {
        "database": database,
        "runner": runner,
        "kind": kind,
        "items": items,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 1),
        **measured,
    }


def report(records: list[dict[str, Any]]) -> str:
    """The tables, as Markdown."""
    groups: dict[tuple[str, str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["database"], record["kind"], record["items"], record["runner"]].append(record)
    lines = [
        "# Task runner",
        "",
        (
            f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; {WORKERS} Dask workers "
            f"of one thread, no-op tasks, batches of {BATCH}. Server, scheduler and workers share the machine. Median, "
            "with the lowest and the highest; `load` is the machine's load average of the measurements."
        ),
        "",
        "| database | what | items | runner | runs | items per second | of stock | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (database, kind, items, runner), found in sorted(groups.items()):
        if kind == "cold":
            continue
        rates = [items / record["seconds"] for record in found]
        # Stock runs no batches and is not measured above 1,000 items: its largest map is its rate.
        stock = groups.get((database, "map", min(items, 1000), "stock")) or groups.get((database, "map", 1000, "stock"))
        ratio = "-"
        if stock:
            peer = statistics.median(record["items"] / record["seconds"] for record in stock)
            ratio = f"{statistics.median(rates) / peer:.1f}"
        loads = [record["load"] for record in found]
        lines.append(
            f"| {database} | {kind} | {items} | {runner} | {len(found)} | {_spread(rates)} | {ratio} "
            f"| {min(loads):.0f}-{max(loads):.0f} |"
        )
    lines += [
        "",
        (
            "| database | what | items | runner | first task (s) | whole flow run (s) | driver peak (MiB) "
            "| server CPU per 1,000 task runs (s) | server caught up after (s) |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (database, kind, items, runner), found in sorted(groups.items()):
        if runner == "dask":
            continue
        cpu = [1000 * record["server_cpu_seconds"] / record["task_runs"] for record in found]
        lines.append(
            f"| {database} | {kind} | {items} | {runner} | {_spread([r['first_task_seconds'] for r in found])} "
            f"| {_spread([r['flow_seconds'] for r in found])} | {_spread([r['peak_mib'] for r in found])} "
            f"| {_spread(cpu) if kind == 'map' else '-'} | {_spread([r['catch_up_seconds'] for r in found])} |"
        )
    return "\n".join(lines) + "\n"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Items per second by runner, as a bar chart with the spread."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record["kind"] != "cold" and record["database"] == "sqlite":
            groups[f"{record['runner']} {record['kind']} {record['items']:,}"].append(
                record["items"] / record["seconds"]
            )
    if not groups:
        return
    names = sorted(groups, key=lambda name: statistics.median(groups[name]))
    medians = [statistics.median(groups[name]) for name in names]
    spread = [
        [median - min(groups[name]) for name, median in zip(names, medians, strict=True)],
        [max(groups[name]) - median for name, median in zip(names, medians, strict=True)],
    ]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(names) + 1.2))
    axes.barh(names, medians, xerr=spread, color=["#1f77b4" if "tidepool" in name else "#999999" for name in names])
    axes.set_xscale("log")
    axes.set_xlabel("items per second (log scale; median, lowest, highest)")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _spread(values: list[float]) -> str:
    def short(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

    return f"{short(statistics.median(values))} ({short(min(values))}-{short(max(values))})"


def main() -> None:
    """Measures, writes and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    options.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    options.add_argument("--runners", nargs="+", choices=["stock", "tidepool", "threads", "dask"], default=None)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--report", action="store_true", help="only make table and plot from what was measured")
    options.add_argument("--results", type=Path, default=RESULTS)
    chosen = options.parse_args()
    chosen.results.mkdir(parents=True, exist_ok=True)
    data = chosen.results / "task_runner.json"
    cells = [cell for row in chosen.rows for cell in ROWS[row] if not chosen.runners or cell[0] in chosen.runners]
    records: list[dict[str, Any]] = json.loads(data.read_text()) if data.exists() else []
    for repeat in range(0 if chosen.report else chosen.repeats):
        for number, (runner, kind, items) in enumerate(cells, 1):
            print(
                f"{repeat + 1}/{chosen.repeats} {number}/{len(cells)} {chosen.database} {runner} {kind} {items}",
                flush=True,
            )
            records.append(measure(chosen.database, runner, kind, items))
            print(f"    {records[-1]['seconds']:.2f} s", flush=True)
            data.write_text(json.dumps(records, indent=1) + "\n")
    table = report(records)
    (chosen.results / "task_runner.md").write_text(table)
    plot(records, chosen.results / "task_runner.svg")
    print(table)


if __name__ == "__main__":
    main()

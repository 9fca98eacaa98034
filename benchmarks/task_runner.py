"""The task runner beside the stock one, Prefect's thread runner and raw Dask: `python -m benchmarks.task_runner`.

Each measurement is a process of its own against a fresh server. The runners take turns, and each run is compared with
the peer's next to it: the machine's own speed changes by half within minutes. Results are added to
benchmarks/results/task_runner.json; the table and the plot are made from it, so a run may be split (`--rows`,
`--repeats`), or only printed (`--report`).
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
from benchmarks.task_runner_flows import BATCH, MARK, PAUSE_SECONDS, WORKERS
from tidepool.settings import environment

RESULTS = Path(__file__).parent / "results"

# Row: what is run by whom, those that are compared beside each other. Stock beyond 1,000 items takes minutes.
ROWS: dict[str, list[tuple[str, str, int]]] = {
    "map-200": [("stock", "map", 200), ("tidepool", "map", 200), ("threads", "map", 200), ("dask", "map", 200)],
    "map-1000": [("stock", "map", 1000), ("threads", "map", 1000), ("dask", "map", 1000), ("tidepool", "map", 1000)],
    "map-5000": [("tidepool", "map", 5000), ("dask", "map", 5000), ("threads", "map", 5000)],
    "batched-1000": [("tidepool", "batched", 1000)],
    "batched-100000": [("tidepool", "batched", 100_000)],
    "auto": [("tidepool", "auto", 5000)],
    # What TLS between the parts of a cluster costs.
    "tls-1000": [
        ("tidepool", "map", 1000),
        ("tidepool-tls", "map", 1000),
        ("dask", "map", 1000),
        ("dask-tls", "map", 1000),
    ],
    # One after another: submitted, and its result waited for.
    "sequential": [(each, "sequential", 200) for each in ("threads", "tidepool", "dask", "stock")],
    "sequential-busy": [(each, "sequential-busy", 40) for each in ("threads", "tidepool", "dask", "stock")],
    # Until the server has recorded it all: part of its work is left until after the results are there.
    "recorded": [("tidepool", "recorded", 1000), ("tidepool", "recorded", 5000)],
    "cold": [("stock", "cold", 0), ("tidepool", "cold", 0)],
    # The driver's memory from few items to many; stock would take a quarter of an hour for the second.
    "memory": [("tidepool", "map", 100), ("tidepool", "map", 10_000)],
}

# What the plot shows, of no-op items only: those of `auto` take their time.
_LINES = {
    ("tidepool", "batched"): ("tidepool, in batches", "#08519c"),
    ("tidepool", "map"): ("tidepool", "#1f77b4"),
    ("dask", "map"): ("raw Dask", "#555555"),
    ("threads", "map"): ("Prefect's threads", "#2ca02c"),
    ("stock", "map"): ("stock", "#d62728"),
}

# Records of one row: by database, what is run, how many items, and the runner.
Groups = dict[tuple[str, str, int, str], list[dict[str, Any]]]

_MEASUREMENT_SECONDS = 900


def code() -> str:
    """Return the commit that last changed more than results, with a `+` for uncommitted changes."""
    other = ["--", ":/", f":(top,exclude){RESULTS.relative_to(RESULTS.parents[1])}"]

    def git(*arguments: str) -> str:
        command = ["git", *arguments, *other]
        return subprocess.run(command, cwd=RESULTS.parent, check=True, capture_output=True, text=True).stdout.strip()

    return git("log", "-1", "--format=%h", "--abbrev=12") + ("+" if git("status", "--porcelain") else "")


def measure(database: str, runner: str, kind: str, items: int) -> dict[str, Any]:
    """One measurement: the flow's figures, and the server's CPU time until it has recorded everything."""
    with prefect_server(database) as server:
        before = server.cpu_seconds()
        variables = {**environment(), "PREFECT_API_URL": server.api}
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
            measured["lost_task_runs"] = server.catch_up(flow_run_id, measured["task_runs"])
            measured["catch_up_seconds"] = time.monotonic() - ended
            measured["server_cpu_seconds"] = server.cpu_seconds() - before
    return {
        "database": database,
        "runner": runner,
        "kind": kind,
        "items": items,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code(),
        "load": round(os.getloadavg()[0], 1),
        **measured,
    }


def _rate(record: dict[str, Any]) -> float:
    return float(record["items"] / record["seconds"])


def _rates(found: list[dict[str, Any]]) -> list[float]:
    return [_rate(record) for record in found]


def _ratios(found: list[dict[str, Any]], beside: list[dict[str, Any]]) -> list[float]:
    """Items per second of each run, by those of the peer's run next to it: the one before, of two as near."""

    def nearest(record: dict[str, Any]) -> dict[str, Any]:
        return min(beside, key=lambda peer: abs(peer["number"] - record["number"]))

    return [_rate(record) / _rate(nearest(record)) for record in found]


def _ratio(groups: Groups, key: tuple[str, str, int, str], peer: str) -> str:
    """Items per second of a row, by those of a peer at as many items: of its largest map where it was not measured."""
    database, kind, items, _ = key
    if kind in {"auto", "recorded"}:
        return "-"
    beside = groups.get((database, kind, items, peer))
    if not beside and not kind.startswith("sequential"):
        beside = groups.get((database, "map", items, peer)) or groups.get((database, "map", 1000, peer))
    if not beside:
        return "-"
    ratio = statistics.median(_ratios(groups[key], beside))
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}" if ratio < 1 else f"{ratio:.1f}"


def _tls(groups: Groups, database: str) -> list[str]:
    """Return what TLS costs, a line for each runner that was measured with it."""
    lines = []
    for runner in ("tidepool", "dask"):
        if tls := groups.get((database, "map", 1000, f"{runner}-tls")):
            ratios = _ratios(tls, groups[database, "map", 1000, runner])
            lines.append(
                f"- {database}, 1,000 items by TLS, {runner}: {statistics.median(ratios):.2f} of without "
                f"({min(ratios):.2f}-{max(ratios):.2f} in {len(ratios)} turns; target 0.95)."
            )
    return lines


def _summary(groups: Groups) -> list[str]:
    """Return the promised figures, a line each."""
    lines = []
    for database in sorted({key[0] for key in groups}):
        thousand = (database, "map", 1000, "tidepool")
        if thousand in groups:
            lines.append(
                f"- {database}, 1,000 items: {_ratio(groups, thousand, 'stock')} times stock (target 10), "
                f"{_ratio(groups, thousand, 'dask')} of raw Dask (target 0.3)."
            )
        lines += _tls(groups, database)
        for items in (1000, 100_000):
            batched = (database, "batched", items, "tidepool")
            if batched in groups:
                lines.append(
                    f"- {database}, {items:,} items in batches: {_ratio(groups, batched, 'stock')} times stock "
                    "(target 100)."
                )
        auto = (database, "auto", 5000, "tidepool")
        if auto in groups:
            shares = [1 - 5000 * record["item_seconds"] / WORKERS / record["seconds"] for record in groups[auto]]
            lines.append(
                f"- {database}, 5,000 items of {1000 * PAUSE_SECONDS:.0f} ms in batches that `auto` chose: "
                f"{100 * statistics.median(shares):.1f} % of the time is overhead, measuring included (target 5)."
            )
        for kind, until in (("recorded", "everything is on the server"), ("map", "the driver has the results")):
            few, many = ((database, kind, items, "tidepool") for items in (1000, 5000))
            if few in groups and many in groups:
                changes = [100 * (1 / ratio - 1) for ratio in _ratios(groups[many], groups[few])]
                lines.append(
                    f"- {database}, from 1,000 to 5,000 items the time per item until {until} changes by "
                    f"{statistics.median(changes):+.0f} % ({min(changes):+.0f} to {max(changes):+.0f} % in "
                    f"{len(changes)} turns; target within 15 %)."
                )
        few, many = ((database, "map", items, "tidepool") for items in (100, 10_000))
        if few in groups and many in groups:
            least, most = (statistics.median(record["peak_mib"] for record in groups[key]) for key in (few, many))
            lines.append(
                f"- {database}, from 100 to 10,000 items the driver's memory changes by "
                f"{100 * (most / least - 1):+.0f} % ({least:.0f} to {most:.0f} MiB; target within 20 %)."
            )
    return lines


def report(records: list[dict[str, Any]]) -> str:
    """Render the tables as Markdown."""
    groups: Groups = defaultdict(list)
    for number, record in enumerate(sorted(records, key=lambda record: str(record["at"]))):
        key = record["database"], record["kind"], record["items"], record["runner"]
        groups[key].append({**record, "number": number})
    lines = [
        "# Task runner",
        "",
        (
            f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; {WORKERS} Dask workers "
            f"of one thread, no-op tasks, batches of {BATCH}. Server, scheduler and workers share the machine. Median, "
            "with the lowest and the highest; `of` a peer is the median of the runs' ratios, "
            "each to the peer's run next to it; `load` is the machine's load average of the measurements. "
            f"Code measured: {', '.join(sorted({record['code'] for record in records}))}."
        ),
        "",
        *_summary(groups),
        "",
        "| database | what | items | runner | runs | items per second | of stock | of raw Dask | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (database, kind, items, runner), found in sorted(groups.items()):
        if kind == "cold":
            continue
        loads = [record["load"] for record in found]
        lines.append(
            f"| {database} | {kind} | {items} | {runner} | {len(found)} | {_spread(_rates(found))} "
            f"| {_ratio(groups, (database, kind, items, runner), 'stock')} "
            f"| {_ratio(groups, (database, kind, items, runner), 'dask')} | {min(loads):.0f}-{max(loads):.0f} |"
        )
    lines += [
        "",
        (
            "| database | what | items | runner | first task (s) | whole flow run (s) | driver peak (MiB) "
            "| server CPU per 1,000 task runs (s) | server caught up after (s) | task runs that the server lost |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (database, kind, items, runner), found in sorted(groups.items()):
        if runner in {"dask", "dask-tls"}:
            continue
        cpu = [1000 * record["server_cpu_seconds"] / record["task_runs"] for record in found]
        peak = [record["peak_mib"] for record in found if "peak_mib" in record]
        lines.append(
            f"| {database} | {kind} | {items} | {runner} | {_spread([r['first_task_seconds'] for r in found])} "
            f"| {_spread([r['flow_seconds'] for r in found])} | {_spread(peak)} "
            f"| {_spread(cpu) if kind == 'map' else '-'} | {_spread([r['catch_up_seconds'] for r in found])} "
            f"| {max(r.get('lost_task_runs', 0) for r in found)} |"
        )
    return "\n".join(lines) + "\n"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Items per second by the number of items: a panel for each database, a line for each runner."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"  # text, not outlines
    from matplotlib import pyplot as plt

    groups: dict[tuple[str, str], dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if (record["runner"], record["kind"]) in _LINES:
            groups[record["runner"], record["kind"]][record["database"], record["items"]].append(_rate(record))
    databases = sorted({record["database"] for record in records}, reverse=True)
    if not databases:
        return
    figure, panels = plt.subplots(1, len(databases), figsize=(9, 4.5), sharey=True, squeeze=False, layout="constrained")
    for database, axes in zip(databases, panels[0], strict=True):
        axes.set(title=database, xlabel="items", xlim=(70, 150_000), xscale="log", yscale="log")
        for (runner, kind), (name, color) in _LINES.items():
            found = sorted((items, rates) for (of, items), rates in groups[runner, kind].items() if of == database)
            if not found:
                continue
            medians = [statistics.median(rates) for _, rates in found]
            spread = [
                [median - min(rates) for median, (_, rates) in zip(medians, found, strict=True)],
                [max(rates) - median for median, (_, rates) in zip(medians, found, strict=True)],
            ]
            sizes = [items for items, _ in found]
            axes.errorbar(sizes, medians, yerr=spread, color=color, label=name, marker="o", markersize=4, capsize=2)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("items per second (median, lowest, highest)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(_LINES))
    figure.savefig(path)
    plt.close(figure)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"

    def short(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

    return f"{short(statistics.median(values))} ({short(min(values))}-{short(max(values))})"


def main() -> None:
    """Measures, writes and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    options.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    options.add_argument(
        "--runners", nargs="+", choices=sorted({each for row in ROWS.values() for each, _, _ in row}), default=None
    )
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

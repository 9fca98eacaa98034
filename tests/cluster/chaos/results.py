"""The chaos table: benchmarks/results/chaos.json has every trial, chaos.md is made from it."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

from installed import TOP

from benchmarks.task_runner import code

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

RESULTS = TOP / "benchmarks" / "results"


def add(record: dict[str, Any], folder: Path = RESULTS) -> None:
    """Add a trial to the file, and make the table from all of them."""
    data = folder / "chaos.json"
    records = json.loads(data.read_text()) if data.exists() else []
    records.append({**record, "code": code(), "load": round(os.getloadavg()[0], 1)})
    data.write_text(json.dumps(records, indent=1) + "\n")


def write_table(not_run: Mapping[str, str], order: Iterable[str], folder: Path = RESULTS) -> None:
    """Write chaos.md."""
    data = folder / "chaos.json"
    if data.exists():
        (folder / "chaos.md").write_text(table(json.loads(data.read_text()), not_run, list(order)))


def table(records: list[dict[str, Any]], not_run: Mapping[str, str], order: list[str]) -> str:
    """Return the table as Markdown: a line for each fault and runner, in the order of the suite."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["row"], record["runner"]), []).append(record)
    lines = [
        "# Chaos",
        "",
        (
            "`make chaos` makes this table: a fault injected into running flows with mapped tasks, each with its "
            "own Dask cluster, on a Kubernetes cluster of one node (2 cores) with PostgreSQL, Redis and an S3 "
            "store. Seconds are median and highest. *No Dask pod* counts from the fault, or from the end of a run "
            "that outlives it (marked *end*); left over is what is there 60 s after that. *Done* are items that "
            "have an object in the store: of a run that is not Completed, fewer than all. *Twice* are items that "
            "were done again. "
            f"Code measured: {', '.join(sorted({record['code'] for record in records}))}."
        ),
        "",
        *_summary(records),
        "",
        (
            "| fault | runner | trials | promises kept | final state | seconds to it | message "
            "| seconds to no Dask pod | items done | twice | left over |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = sorted(groups, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key[1] == "stock"))
    lines += [_line(row, runner, groups[row, runner]) for row, runner in rows]
    if broken := [each for each in records if each["faults"] and each["runner"] != "stock"]:
        lines += ["", "Promises that were broken:", ""]
        counted = Counter((each["row"], reason) for each in broken for reason in each["faults"])
        lines += [f"- {row}, {times} times: {reason}" for (row, reason), times in sorted(counted.items())]
    measured = {row for row, _ in groups}
    if unmeasured := [row for row in order if row not in measured and row not in not_run]:
        lines += ["", f"Without a trial in this table: {', '.join(unmeasured)}."]
    lines += ["", "Not run:", "", *(f"- {row}: {reason}." for row, reason in sorted(not_run.items()))]
    return "\n".join(lines) + "\n"


def _summary(records: list[dict[str, Any]]) -> list[str]:
    """Return the promised figures, a line for each runner."""
    lines = []
    for runner in ("tidepool", "stock"):
        found = [each for each in records if each["runner"] == runner]
        if not found:
            continue
        left, green, stuck = (
            sum(any(reason.startswith(kind) for reason in each["faults"]) for each in found)
            for kind in ("left over", "falsely green", "stuck")
        )
        lines.append(
            f"- {runner}: {len(found)} trials, left over after 60 s in {left}, falsely green {green}, stuck {stuck}."
        )
    return lines


def _line(row: str, runner: str, found: list[dict[str, Any]]) -> str:
    kept = sum(not each["faults"] for each in found)
    states = Counter(each["name"] for each in found)
    messages = Counter(each["message"] for each in found).most_common(1)[0][0]
    gone = [each["seconds_to_no_dask_pod"] for each in found if each["seconds_to_no_dask_pod"] is not None]
    seconds = _spread(gone) + (" (end)" if found[0]["from_end"] else "")
    left = Counter(name.split("/")[0] for each in found for name in each["left"])
    cells = (
        row,
        runner,
        len(found),
        kept,
        ", ".join(f"{name} {times}" if len(states) > 1 else name for name, times in states.items()),
        _spread([each["seconds_to_state"] for each in found if each["final"]]),
        messages.replace("|", "\\|")[:160] or "-",
        seconds if len(gone) == len(found) else f"{seconds}; {len(found) - len(gone)} never",
        f"{sum(each['done'] for each in found)} of {sum(each['items'] for each in found)}",
        sum(each["twice"] for each in found),
        ", ".join(f"{times} {kind}" for kind, times in sorted(left.items())) or "nothing",
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.0f} ({max(values):.0f})" if len(values) > 1 else f"{values[0]:.0f}"

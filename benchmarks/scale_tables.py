"""Markdown tables of what benchmarks.scale has measured."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.cluster_start import percentile
from benchmarks.parts import Usage, above
from benchmarks.task_runner import RESULTS, code

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

STEPS = ("driver's pod", "scheduler's pod", "workers' pods", "all run", "gone")
IDLE = "idle"


def title(chosen: argparse.Namespace) -> str:
    """Return what a measurement is called."""
    rate = f"one every {chosen.every:g} s" if chosen.every else "one at a time"
    what = f"{chosen.runs} runs of {chosen.workers} workers, {rate}, held {chosen.hold:g} s"
    return f"{IDLE if chosen.idle else what}{f', {chosen.label}' if chosen.label else ''}"


def tables(records: dict[str, Any]) -> list[str]:
    """Return Markdown tables of all measurements."""
    idle = {each["label"]: Usage(**each["usage"]) for each in records.values() if each["title"].startswith(IDLE)}
    loads = {name: each for name, each in records.items() if each.get("steps")}
    used = {name: Usage(**each["usage"]) for name, each in loads.items()}
    lines = [
        f"| | runs, ended as they should | {' | '.join(STEPS)} | all run: first, last third | cores busy |",
        f"|---|---|{'---|' * len(STEPS)}---|---|",
    ]
    for number, (name, each) in enumerate(loads.items(), 1):
        steps = each["steps"]
        high = {step: percentile([of[step] for of in steps], 0.95) for step in STEPS}
        cells = [f"{_median(steps, step):.1f} ({high[step]:.1f})" for step in STEPS]
        third = max(1, len(steps) // 3)
        growth = f"{_median(steps[:third], 'all run'):.1f}, {_median(steps[-third:], 'all run'):.1f}"
        ended = f"{len(steps)} of {each['asked']}"
        lines.append(f"| {number}: {name} | {ended} | {' | '.join(cells)} | {growth} | {used[name].busy:.0%} |")
    columns = "".join(f" {number} |" for number in range(1, len(loads) + 1))
    over = {name: (idle.get(each["label"], Usage()), len(each["steps"])) for name, each in loads.items()}

    def rows(
        head: str, cell: Callable[[str, str], str], of: Callable[[Usage], dict[str, float]], *, adds_up: bool = False
    ) -> None:
        calm = next(iter(idle.values()), None)
        seconds = calm.seconds if calm and adds_up else 1.0
        lines.extend(["", f"| {head} | {IDLE} |{columns}", f"|---|---|{'---|' * len(loads)}"])
        for row in sorted({key for each in used.values() for key in of(each)} - {""}):
            first = f"{of(calm).get(row, 0.0) / seconds:.2f}" if calm else "-"
            cells = "".join(f" {cell(row, name)} |" for name in loads)
            lines.append(f"| {row} | {first} |{cells}")

    def per_run(of: Callable[[Usage], dict[str, float]]) -> Callable[[str, str], str]:
        def cell(row: str, name: str) -> str:
            calm, runs = over[name]
            ratio = used[name].seconds / calm.seconds if calm.seconds else 0.0
            return f"{above(of(used[name]), of(calm), ratio, runs).get(row, 0.0):.2f}"

        return cell

    cpu, counts = (lambda each: each.cpu), (lambda each: each.counts)
    rows("CPU seconds per run above idle (idle: cores)", per_run(cpu), cpu, adds_up=True)
    rows(
        "the most of a core within 5 s",
        lambda row, name: f"{used[name].share.get(row, 0):.2f}",
        lambda each: each.share,
    )
    rows("peak memory, MiB", lambda row, name: f"{used[name].memory.get(row, 0):.0f}", lambda each: each.memory)
    rows("requests per run above idle (idle: per second)", per_run(counts), counts, adds_up=True)
    return lines


def _median(steps: list[dict[str, float]], step: str) -> float:
    return statistics.median(each[step] for each in steps)


def record(chosen: argparse.Namespace, figures: dict[str, Any]) -> str:
    """Add a measurement to scale.json, make scale.md of all, and return that."""
    data = RESULTS / "scale.json"
    records = json.loads(data.read_text()) if data.exists() else {}
    name = title(chosen)
    records[name] = {**figures, "title": name, "label": chosen.label, "asked": chosen.runs, "code": code()}
    data.write_text(json.dumps(records, indent=1) + "\n")
    head = [
        "# Growth",
        "",
        (
            "`python -m benchmarks.scale` makes these tables, each row or column by one call, on a Kubernetes cluster "
            "of one node (2 cores) with a fake second one. Seconds: median (95th percentile). The most of a core: "
            "1.00 is all that a single thread can have."
        ),
        "",
    ]
    text = "\n".join([*head, *tables(records)]) + "\n"
    (RESULTS / "scale.md").write_text(text)
    return text

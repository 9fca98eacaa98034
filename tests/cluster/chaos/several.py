"""Rows of several runs: those that were late, and one that waits for the slot of a run whose driver was killed."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from faults import driver_forced, prefect_worker_absent
from installed import FINAL
from trials import Row, Trial, clean, computing, nothing_to_do

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import World

LATE_RUNS = 20
# Items of each late run: enough to see whether one was done twice.
LATE_ITEMS = 2
# Longest time between the ends of two of them; on two cores that do other things, too, all of them took up to 950 s.
STUCK_SECONDS = 300.0
NEXT_SECONDS = 240.0


def late_runs(world: World) -> dict[str, Any]:
    """Have 20 runs become late while no Prefect worker is there; all are done, each once."""
    deployment = world.deployment("chaos-late-runs", concurrency_limit=4)
    with prefect_worker_absent(world):
        runs = [world.start(deployment, count=LATE_ITEMS, seconds=0.0) for _ in range(LATE_RUNS)]
        world.platform.until(lambda: world.look(runs[-1]).get("state_name") == "Late", "the last run is late", 120)
    return _outcome(world, runs, {"Completed": LATE_RUNS})


def late_runs_of_a_schedule(world: World) -> dict[str, Any]:
    """Have 20 runs of a schedule become late; by `after_outage: latest` only the newest is done."""
    with prefect_worker_absent(world):
        first = datetime.now(UTC) + timedelta(seconds=10)
        rule = f"DTSTART:{first:%Y%m%dT%H%M%SZ}\nRRULE:FREQ=SECONDLY;INTERVAL=3;COUNT={LATE_RUNS}"
        deployment = world.deployment(
            "chaos-late-runs-latest",
            parameters={"count": LATE_ITEMS, "seconds": 0.0},
            schedules=[{"schedule": {"rrule": rule, "timezone": "UTC"}, "active": True}],
            job_variables={"after_outage": "latest"},
        )
        # The operator skips while the outage lasts.
        query = {
            "flow_runs": {"deployment_id": {"any_": [deployment]}, "state": {"name": {"any_": ["Late", "Skipped"]}}}
        }
        world.platform.until(
            lambda: len(world.platform.post("flow_runs/filter", query)) == LATE_RUNS, "all runs are late", 180
        )
        runs = [each["id"] for each in world.platform.post("flow_runs/filter", query)]
    outcome = _outcome(world, runs, {"Completed": 1, "Skipped": LATE_RUNS - 1})
    world.platform.delete(f"deployments/{deployment}")
    return outcome


def _outcome(world: World, runs: list[str], expected: dict[str, int]) -> dict[str, Any]:
    """Wait for the end of runs; return what became of them and of their items."""
    began = progress = time.time()
    waiting = set(runs)
    while waiting and time.time() < progress + STUCK_SECONDS:
        time.sleep(2)
        still = {each for each in waiting if world.look(each).get("state_type") not in FINAL}
        progress = time.time() if still != waiting else progress
        waiting = still
    ended = time.time()
    found = [world.platform.run(each) for each in runs]
    states = Counter(each["state_name"] for each in found)
    green = [each["id"] for each in found if each["state_type"] == "COMPLETED"]
    times = [world.times_done(each) for each in green]
    missing = LATE_ITEMS * len(green) - sum(len(each) for each in times)
    left = _left(world, runs)
    named = ", ".join(f"{count} {name}" for name, count in sorted(states.items()))
    others = [each["state"]["message"] for each in found if each["state_type"] != "COMPLETED"]
    broken = [f"stuck: {len(waiting)} runs"] if waiting else []
    broken += [f"{named}, expected {expected}"] if states != expected else []
    broken += [f"falsely green: {missing} items are missing"] if missing else []
    broken += [f"left over after 60 s: {', '.join(left)}"] if left else []
    clean(*(Trial(world, _NO_ROW, each) for each in runs))
    return {
        "name": named,
        "message": others[0] if others else "",
        "final": not waiting,
        "seconds_to_state": round(ended - began, 1),
        "seconds_to_no_dask_pod": 0.0 if not left else None,
        "items": LATE_ITEMS * len(green),
        "done": sum(len(each) for each in times),
        "twice": sum(count > 1 for each in times for count in each.values()),
        "left": left,
        "faults": broken,
    }


def slot_of_a_killed_driver(world: World) -> dict[str, Any]:
    """Kill the driver of a run at a limit of 1 while the next one waits: it gets the slot."""
    deployment = world.deployment(
        "chaos-limit-1", concurrency_limit=1, concurrency_options={"collision_strategy": "ENQUEUE"}
    )
    first = Trial(world, _NO_ROW, world.start(deployment))
    second = Trial(world, _NO_ROW, world.start(deployment))
    first.until(lambda: computing(first) or computing(second), "one of them computes", NEXT_SECONDS)
    if computing(second):
        first, second = second, first
    first.begins()
    driver_forced(first)
    end = first.fault_at + NEXT_SECONDS
    while not second.final() and time.time() < end:
        time.sleep(1)
    run, other = world.platform.run(second.run_id), world.platform.run(first.run_id)
    times = world.times_done(second.run_id)
    left = _left(world, [first.run_id, second.run_id])
    broken = [] if run["state_type"] == "COMPLETED" else [f"stuck: the next run is {run['state_name']}"]
    broken += [] if other["state_type"] == "CRASHED" else [f"the killed run is {other['state_name']}"]
    broken += [f"left over after 60 s: {', '.join(left)}"] if left else []
    clean(first, second)
    return {
        "name": f"{other['state_name']}, the next {run['state_name']}",
        "message": str(other["state"]["message"]),
        "final": run["state_type"] in FINAL,
        "seconds_to_state": round(time.time() - first.fault_at, 1),
        "seconds_to_no_dask_pod": 0.0 if not left else None,
        "items": int(run["parameters"].get("count", 30)),
        "done": len(times),
        "twice": sum(count > 1 for count in times.values()),
        "left": left,
        "faults": broken,
    }


def _left(world: World, runs: list[str]) -> list[str]:
    """Return what is left of these runs a minute after now; sooner if it is nothing."""
    end = time.time() + 60
    while (left := [name for each in runs for name in world.watch.now.left(each)]) and time.time() < end:
        time.sleep(1)
    return left


_NO_ROW = Row(nothing_to_do, (), 0.0)

SEVERAL: dict[str, Callable[[World], dict[str, Any]]] = {
    "late-runs-20": late_runs,
    "late-runs-20-latest": late_runs_of_a_schedule,
    "slot-of-a-killed-driver": slot_of_a_killed_driver,
}

"""One trial: a run with a fault injected into it, and what is measured of its end and of what is left."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from installed import FINAL
from world import POLL_SECONDS, Snapshot, World, may_stay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Until a run computes, on a busy node.
START_SECONDS = 240.0
# The promise: after this many seconds nothing is left.
ORPHAN_SECONDS = 60.0
ITEMS = 30


@dataclass(frozen=True)
class Row:
    """A fault, and what is promised of the run that it meets.

    Attributes:
        inject: Does it. For a fault of the platform: called once, with one of the batch's trials.
        expected: Types of the run's final state that are right.
        seconds: Seconds from the fault to a final state.
        passing: Types of final states that are followed by another try.
        says: Text that the final state's message contains.
        from_end: Whether what is left is judged from the run's end: for runs that outlive the fault.
        of_platform: Whether the fault is the platform's and not one run's.
        when: The moment for the fault.
        around: Entered before the runs start, left when they are measured.
        parameters: Of the flow.
        variables: Job variables; a function of the world returns one that depends on the installation.
        deployment: Further fields of the deployment.
    """

    inject: Callable[[Trial], None]
    expected: tuple[str, ...]
    seconds: float
    passing: tuple[str, ...] = ()
    says: str = ""
    from_end: bool = False
    of_platform: bool = False
    when: Callable[[Trial], bool] | None = None
    around: Callable[[World], AbstractContextManager[None]] = lambda _: nullcontext()
    parameters: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    deployment: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trial:
    """One run of a row.

    Attributes:
        world: What trials share.
        row: What is done to it.
        run_id: The run.
        fault_at: Seconds of the epoch at which the fault began.
        batch: All trials that run at the same time.
    """

    world: World
    row: Row
    run_id: str
    fault_at: float = 0.0
    batch: list[Trial] = field(default_factory=list, repr=False)

    @property
    def snapshot(self) -> Snapshot:
        """The latest reading of the runs' namespace."""
        return self.world.watch.now

    def begins(self) -> None:
        """Note that the fault begins now."""
        self.fault_at = time.time()

    def driver(self) -> str:
        """Return the name of its driver pod."""
        return str(self.snapshot.driver_pods(self.run_id)[-1]["metadata"]["name"])

    def dask(self, component: str) -> list[str]:
        """Return the names of its Dask pods, schedulers or workers."""
        pods = self.snapshot.dask_pods(self.run_id)
        return [
            each["metadata"]["name"] for each in pods if each["metadata"]["labels"]["dask.org/component"] == component
        ]

    def execute(self, pod: str, script: str, *arguments: str) -> None:
        """Run a Python script in one of its pods."""
        self.world.platform.runs.kubectl("exec", pod, "--", "python", "-c", script, *arguments)

    def until(self, condition: Callable[[], Any], what: str, seconds: float) -> None:
        """Wait for something; raise an error with the run's state when it does not happen, or the run ends before."""
        end = time.time() + seconds
        while not condition():
            if state := self.final():
                raise RuntimeError(f"{what}: the run ended before it; {state['name']}: {state['message']}")
            if time.time() > end:
                state = self.world.look(self.run_id).get("state") or {}
                raise TimeoutError(f"{what}: not within {seconds:g} s; {state.get('name')}: {state.get('message')}")
            time.sleep(POLL_SECONDS / 2)  # each look asks the server

    def final(self) -> dict[str, Any] | None:
        """Return its final state, if it has one."""
        run = self.world.look(self.run_id)
        return run["state"] if run.get("state_type") in FINAL - set(self.row.passing) else None

    def measure(self) -> dict[str, Any]:
        """Wait for its end, and for nothing to be left; return the figures."""
        deadline = self.fault_at + self.row.seconds
        state = None
        gone = 0.0
        while state is None and time.time() < deadline:
            time.sleep(POLL_SECONDS / 2)
            gone = self._gone(gone)
            state = self.final()
        ended = _seconds_of(state["timestamp"]) if state else time.time()
        begin = ended if self.row.from_end else self.fault_at
        left = ["not read"]
        while left and time.time() < begin + ORPHAN_SECONDS:
            time.sleep(POLL_SECONDS / 2)
            gone = self._gone(gone)
            left = self.snapshot.left(self.run_id)
        left = left and self.world.watch.after(begin + ORPHAN_SECONDS).left(self.run_id)
        # The message that stays.
        run = self.world.platform.run(self.run_id)
        counted = self.world.times_done(self.run_id)
        items = int(self.row.parameters.get("count", ITEMS))
        return {
            "run": self.run_id,
            "state": run["state_type"],
            "name": run["state_name"],
            "message": " ".join(str(run["state"].get("message") or "").split())[:400],
            "final": state is not None,
            "seconds_to_state": round(ended - self.fault_at, 1),
            "seconds_to_no_dask_pod": round(max(gone - begin, 0.0), 1) if gone else None,
            "items": items,
            "done": len(counted),
            "twice": sum(times > 1 for times in counted.values()),
            "left": left,
            "run_count": run["run_count"],
        }

    def _gone(self, since: float) -> float:
        """Return since when no Dask pod is left: the end of the earliest reading after which there was none."""
        snapshot = self.snapshot
        if snapshot.at <= self.fault_at or snapshot.dask_pods(self.run_id):
            return 0.0
        return since or snapshot.ended


def _seconds_of(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def faults(row: Row, figures: dict[str, Any]) -> list[str]:
    """Return which promises a trial broke, in words."""
    found = []
    missing = figures["items"] - figures["done"]
    if not figures["final"]:
        found.append(f"stuck: {figures['name']} {row.seconds:g} s after the fault")
    elif figures["state"] not in row.expected:
        found.append(f"{figures['state']}, expected {' or '.join(row.expected)}")
    if figures["state"] == "COMPLETED" and missing:
        found.append(f"falsely green: {missing} items are missing")
    if figures["left"]:
        found.append(f"left over after {ORPHAN_SECONDS:g} s: {', '.join(figures['left'])}")
    if row.says and figures["final"] and row.says not in figures["message"]:
        found.append(f"the message lacks {row.says!r}")
    return found


def batch(world: World, name: str, row: Row, count: int) -> Iterator[dict[str, Any]]:
    """Run so many trials of a row at the same time; yield the figures of each."""
    deployment = world.deployment(f"chaos-{name}", job_variables=row.variables, **row.deployment)
    with row.around(world), ThreadPoolExecutor(2 * count) as threads:
        trials: list[Trial] = []
        try:
            for _ in range(count):
                trials.append(Trial(world, row, world.start(deployment, **row.parameters), batch=trials))
            if row.of_platform:
                list(threads.map(_ready, trials))
                moment = time.time()
                for each in trials:
                    each.fault_at = moment
                injected = [threads.submit(row.inject, trials[0])]
                measured = [threads.submit(Trial.measure, each) for each in trials]
            else:
                injected = []
                measured = [threads.submit(_break, each) for each in trials]
            wait([*injected, *measured])
        finally:
            if trials:
                clean(*trials)
    for each in injected:
        each.result()
    # One that was not a trial costs the batch no other.
    yield from (each.result() for each in measured if not each.exception())
    for each in measured:
        each.result()


def _ready(trial: Trial) -> None:
    """Wait for the moment of the fault."""
    when = trial.row.when or computing
    trial.until(lambda: when(trial), "the moment for the fault", START_SECONDS)


def _break(trial: Trial) -> dict[str, Any]:
    """Inject a fault into one run, and measure it."""
    _ready(trial)
    trial.begins()
    trial.row.inject(trial)
    return trial.measure()


def clean(*trials: Trial) -> None:
    """Remove what trials left, so that the next ones begin with nothing."""
    world = trials[0].world
    now = world.watch.after(time.time())
    left = [each for trial in trials for each in now.of(trial.run_id) if not may_stay(each)]
    for kind in ("Job", "DaskCluster", "DaskWorkerGroup", "DaskAutoscaler", "Deployment", "Pod"):
        names = [each["metadata"]["name"] for each in left if each["kind"] == kind]
        if names:
            options = ("--ignore-not-found", "--wait=false", "--grace-period=0", "--force")
            world.platform.runs.kubectl("delete", kind, *names, *options)
    for trial in trials:
        _end(trial)


def _end(trial: Trial) -> None:
    """Give a run that has no final state one."""
    if trial.world.look(trial.run_id).get("state_type") not in FINAL:
        state = {"type": "CRASHED", "name": "Crashed", "message": "cleaned up after the trial"}
        trial.world.platform.post(f"flow_runs/{trial.run_id}/set_state", {"state": state, "force": True})


# --- moments ----------------------------------------------------------------------------------------------------------


def computing(trial: Trial) -> bool:
    """Tell whether items are being done: the store has some."""
    return bool(trial.snapshot.dask_pods(trial.run_id)) and len(trial.world.times_done(trial.run_id, POLL_SECONDS)) >= 2


def fault_has_begun(trial: Trial) -> bool:
    """Tell whether a fault that the flow itself makes has begun."""
    return "fault" in trial.world.stored(trial.run_id, POLL_SECONDS)


def at_once(_trial: Trial) -> bool:
    """Tell that there is nothing to wait for."""
    return True


def nothing_to_do(_trial: Trial) -> None:
    """Do nothing to a run."""


def in_state(*names: str) -> Callable[[Trial], bool]:
    """Return the moment in which a run has one of these states."""
    return lambda trial: trial.world.look(trial.run_id).get("state_name") in names


def cluster_starting(trial: Trial) -> bool:
    """Tell whether its Dask cluster has been asked for; its pods need some seconds more."""
    return any(each["kind"] == "DaskCluster" for each in trial.snapshot.of(trial.run_id))


def now() -> str:
    """Return the time for a record."""
    return datetime.now(UTC).isoformat(timespec="seconds")

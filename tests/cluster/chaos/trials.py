"""One trial: a run with a fault injected into it, and what is measured of its end and of what is left."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import httpx
from installed import AUTH, FINAL, Platform
from kube import DASK_KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POLL_SECONDS = 1.0
# Until a run computes, on a busy node.
START_SECONDS = 240.0
# The promise: after this many seconds nothing is left.
ORPHAN_SECONDS = 60.0
KINDS = f"jobs,pods,services,secrets,deployments,{DASK_KINDS}"
ITEMS = 30


@dataclass
class Snapshot:
    """All objects in the runs' namespace at one time.

    Attributes:
        at: Seconds of the epoch; nothing that happened before is missing.
        objects: As Kubernetes has them.
    """

    at: float = 0.0
    objects: list[dict[str, Any]] = field(default_factory=list)

    def of(self, run_id: str) -> list[dict[str, Any]]:
        """Return the objects of a run: its Job and driver pod, and what has the name of its Dask clusters."""
        part = f"-{run_id[:8]}-"
        return [
            each
            for each in self.objects
            if part in each["metadata"]["name"]
            or each["metadata"].get("labels", {}).get("prefect.io/flow-run-id") == run_id
        ]

    def dask_pods(self, run_id: str) -> list[dict[str, Any]]:
        """Return the pods of its Dask clusters."""
        labelled = (each for each in self.of(run_id) if each["kind"] == "Pod")
        return [each for each in labelled if "dask.org/cluster-name" in each["metadata"].get("labels", {})]

    def driver_pods(self, run_id: str) -> list[dict[str, Any]]:
        """Return its driver pods, the newest last."""
        found = [each for each in self.of(run_id) if each["kind"] == "Pod"]
        drivers = [each for each in found if "prefect.io/flow-run-id" in each["metadata"].get("labels", {})]
        return sorted(drivers, key=lambda each: each["metadata"]["creationTimestamp"])

    def left(self, run_id: str) -> list[str]:
        """Return what a run that has ended should not have, as kind/name."""
        return sorted(f"{each['kind']}/{each['metadata']['name']}" for each in self.of(run_id) if not _may_stay(each))


def _may_stay(each: dict[str, Any]) -> bool:
    """Tell whether an object is a finished Job or driver pod: these stay for their logs, as long as the pool says."""
    if each["kind"] == "Job":
        conditions = each.get("status", {}).get("conditions", [])
        return any(one["status"] == "True" and one["type"] in {"Complete", "Failed"} for one in conditions)
    of_dask = "dask.org/cluster-name" in each["metadata"].get("labels", {})
    return each["kind"] == "Pod" and not of_dask and each["status"]["phase"] in {"Succeeded", "Failed"}


class Watch:
    """A thread that reads the runs' namespace every second: one request for all trials that run at the same time."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.now = Snapshot()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            began = time.time()
            try:
                self.now = Snapshot(began, self.platform.runs.get(KINDS))
            except RuntimeError:
                continue  # the Kubernetes API is away; `at` shows how old the last reading is

    def after(self, moment: float) -> Snapshot:
        """Wait for a reading that began after a moment."""
        while self.now.at <= moment:
            time.sleep(0.2)
        return self.now


@dataclass
class World:
    """What all trials of a session share.

    Attributes:
        platform: The installation, as the trials' team sees it.
        watch: The reader of its runs' namespace.
        entrypoint: The flow that is broken.
        variables: Job variables of all its deployments.
        runner: `tidepool` or `stock`.
    """

    platform: Platform
    watch: Watch
    entrypoint: str = "chaos_flows.items"
    variables: dict[str, Any] = field(default_factory=dict)
    runner: str = "tidepool"

    def deployment(self, name: str, *, entrypoint: str = "", **fields: Any) -> str:
        """Create or change a deployment of the broken flow; return its id."""
        entrypoint = entrypoint or self.entrypoint
        flow = self.platform.post("flows/", {"name": entrypoint.replace("_", "-").replace(".", "-")})
        variables = {"image": self.platform.image, **self.variables, **self.accepted(fields.pop("job_variables", {}))}
        body = {
            "name": name,
            "flow_id": flow["id"],
            "entrypoint": entrypoint,
            "path": ".",
            "pull_steps": [],
            "enforce_parameter_schema": False,
            "work_pool_name": self.platform.pool,
            "job_variables": variables,
            **fields,
        }
        return str(self.platform.post("deployments/", body)["id"])

    def accepted(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the job variables that the work pool's template has."""
        template = self.platform.read(f"work_pools/{self.platform.pool}")["base_job_template"]
        known = template["variables"]["properties"]
        return {key: value(self) if callable(value) else value for key, value in variables.items() if key in known}

    def start(self, deployment_id: str, **parameters: Any) -> str:
        """Start a run; return its id."""
        body = {"parameters": parameters, "state": {"type": "SCHEDULED", "name": "Scheduled"}}
        return str(self.platform.post(f"deployments/{deployment_id}/create_flow_run", body)["id"])

    def look(self, run_id: str) -> dict[str, Any]:
        """Return a run as the server knows it; empty while the server does not answer."""
        try:
            answer = httpx.get(f"{self.platform.api}/flow_runs/{run_id}", auth=AUTH, timeout=10)
        except httpx.TransportError:
            return {}
        return dict(answer.json()) if answer.is_success else {}

    def set_state(self, run_id: str, **state: Any) -> None:
        """Propose a state, as the UI does."""
        self.platform.post(f"flow_runs/{run_id}/set_state", {"state": state})

    def stored(self, run_id: str) -> dict[str, float]:
        """Return the objects of a run in the store, with the seconds of the epoch at which they were made."""
        # A folder that does not exist yet is empty.
        script = f"cd /tmp/buckets/tidepool/chaos/{run_id} 2>/dev/null && find . -type f -printf '%T@ %P\\n' || true"
        printed = self.platform.namespace.kubectl(
            "exec", "deployment/store", "--container=store", "--", "sh", "-c", script
        )
        lines = (line.split(" ", 1) for line in printed.splitlines())
        return {name: float(at) for at, name in lines}

    def times_done(self, run_id: str) -> dict[int, int]:
        """Return how often each item was done."""
        done: dict[int, int] = {}
        for name in self.stored(run_id):
            kind, _, rest = name.partition("/")
            if kind == "items":
                number = int(rest.partition("/")[0])
                done[number] = done.get(number, 0) + 1
        return done


@dataclass(frozen=True)
class Row:
    """A fault, and what is promised of the run that it meets.

    Attributes:
        inject: Does it. For a fault of the platform: called once, with one of the batch's trials.
        expected: Types of the run's final state that are right.
        seconds: Seconds from the fault to a final state.
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
        """Wait for something; raise an error with the run's state when it does not happen."""
        end = time.time() + seconds
        while not condition():
            if time.time() > end:
                run = self.world.look(self.run_id)
                state = run.get("state") or {}
                raise TimeoutError(f"{what}: not within {seconds:g} s; {state.get('name')}: {state.get('message')}")
            time.sleep(0.5)

    def final(self) -> dict[str, Any] | None:
        """Return its final state, if it has one."""
        run = self.world.look(self.run_id)
        return run["state"] if run.get("state_type") in FINAL else None

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
            "seconds_to_no_dask_pod": round(gone - begin, 1) if gone else None,
            "items": items,
            "done": len(counted),
            "twice": sum(times > 1 for times in counted.values()),
            "left": left,
            "run_count": run["run_count"],
        }

    def _gone(self, since: float) -> float:
        """Return since when no Dask pod is left: the earliest reading without one, after which there was none."""
        snapshot = self.snapshot
        if snapshot.at <= self.fault_at or snapshot.dask_pods(self.run_id):
            return 0.0
        return since or snapshot.at


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
                results = list(threads.map(Trial.measure, trials))
            else:
                injected = []
                results = list(threads.map(_break, trials))
            for each in injected:
                each.result()
        finally:
            for each in trials:
                clean(each)
    yield from results


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


def clean(trial: Trial) -> None:
    """Remove what a trial left, so that the next one begins with nothing."""
    runs = trial.world.platform.runs
    for kind in ("job", "daskcluster", "daskworkergroup", "daskautoscaler", "deployment", "pod"):
        names = [
            each["metadata"]["name"]
            for each in trial.world.watch.after(time.time()).of(trial.run_id)
            if each["kind"].lower() == kind and not _may_stay(each)
        ]
        if names:
            runs.kubectl("delete", kind, *names, "--ignore-not-found", "--wait=false", "--grace-period=0", "--force")
    if trial.world.look(trial.run_id).get("state_type") not in FINAL:
        state = {"type": "CRASHED", "name": "Crashed", "message": "cleaned up after the trial"}
        trial.world.platform.post(f"flow_runs/{trial.run_id}/set_state", {"state": state, "force": True})


# --- moments ----------------------------------------------------------------------------------------------------------


def computing(trial: Trial) -> bool:
    """Tell whether items are being done: the store has some."""
    return bool(trial.snapshot.dask_pods(trial.run_id)) and len(trial.world.times_done(trial.run_id)) >= 2


def fault_has_begun(trial: Trial) -> bool:
    """Tell whether a fault that the flow itself makes has begun."""
    return "fault" in trial.world.stored(trial.run_id)


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


@contextmanager
def scaled_to_zero(namespace: Any, deployment: str) -> Iterator[None]:
    """Have a Kubernetes Deployment without pods for the time of the block."""
    selector = json.loads(namespace.kubectl("get", "deployment", deployment, "--output=json"))["spec"]["selector"]
    labels = ",".join(f"{key}={value}" for key, value in selector["matchLabels"].items())
    namespace.kubectl("scale", f"deployment/{deployment}", "--replicas=0")
    try:
        namespace.until(lambda: not namespace.names("pods", labels), f"{deployment} is away", 90)
        yield
    finally:
        back(namespace, deployment)


def back(namespace: Any, deployment: str) -> None:
    """Have it again, and wait until it is ready."""
    namespace.kubectl("scale", f"deployment/{deployment}", "--replicas=1")
    namespace.kubectl("rollout", "status", f"deployment/{deployment}", "--timeout=180s", timeout=200)

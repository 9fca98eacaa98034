"""The installation that trials share: what is in the runs' namespace, on the server and in the store."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import httpx
from installed import AUTH, Platform
from kube import DASK_KINDS

from tests.polling import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kube import Namespace

# Each reading is a kubectl, which takes a quarter of a second of the CPU that the runs need.
POLL_SECONDS = 2.0
KINDS = f"jobs,pods,services,secrets,deployments,{DASK_KINDS}"


@dataclass
class Snapshot:
    """All objects in the runs' namespace at one time.

    Attributes:
        at: Seconds of the epoch; nothing that happened before is missing.
        ended: When the reading had ended; nothing in it happened later.
        objects: As Kubernetes has them.
    """

    at: float = 0.0
    ended: float = 0.0
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
        return sorted(f"{each['kind']}/{each['metadata']['name']}" for each in self.of(run_id) if not may_stay(each))


def may_stay(each: dict[str, Any]) -> bool:
    """Tell whether an object is a finished Job or driver pod: these stay for their logs, as long as the pool says."""
    if each["kind"] == "Job":
        conditions = each.get("status", {}).get("conditions", [])
        return any(one["status"] == "True" and one["type"] in {"Complete", "Failed"} for one in conditions)
    of_dask = "dask.org/cluster-name" in each["metadata"].get("labels", {})
    return each["kind"] == "Pod" and not of_dask and each["status"]["phase"] in {"Succeeded", "Failed"}


class Watch:
    """A thread that reads the runs' namespace every two seconds: one request for all trials of a time."""

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
                objects = self.platform.runs.get(KINDS)
                self.now = Snapshot(began, time.time(), objects)
            except RuntimeError:
                continue  # the Kubernetes API is away; `at` shows how old the last reading is

    def after(self, moment: float) -> Snapshot:
        """Wait for a reading that began after a moment.

        Raises:
            AssertionError: there was none for ten minutes: the Kubernetes API is away, or the reader has died.
        """
        return until(lambda: self.now, lambda now: now.at > moment, seconds=max(moment - time.time(), 0) + 600)


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
    _objects: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)
    _read_at: float = 0.0
    _reading: threading.Lock = field(default_factory=threading.Lock, repr=False)

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

    def stored(self, run_id: str, seconds: float = 0.0) -> dict[str, float]:
        """Return the objects of a run in the store, with the seconds of the epoch at which they were made.

        Trials that run at the same time share a reading, which may be `seconds` old.
        """
        oldest = time.time() - seconds
        with self._reading:
            if self._read_at < oldest:
                self._read_at = time.time()
                # A folder that does not exist yet is empty.
                script = "cd /tmp/buckets/tidepool/chaos 2>/dev/null && find . -type f -printf '%T@ %P\\n' || true"
                printed = self.platform.namespace.kubectl(
                    "exec", "deployment/store", "--container=store", "--", "sh", "-c", script
                )
                self._objects = {}
                for line in printed.splitlines():
                    at, name = line.split(" ", 1)
                    run, _, rest = name.partition("/")
                    self._objects.setdefault(run, {})[rest] = float(at)
            return self._objects.get(run_id, {})

    def times_done(self, run_id: str, seconds: float = 0.0) -> dict[int, int]:
        """Return how often each item was done, by a reading that may be `seconds` old."""
        done: dict[int, int] = {}
        for name in self.stored(run_id, seconds):
            kind, _, rest = name.partition("/")
            if kind == "items":
                number = int(rest.partition("/")[0])
                done[number] = done.get(number, 0) + 1
        return done


@contextmanager
def scaled_to_zero(namespace: Namespace, deployment: str) -> Iterator[None]:
    """Have a Kubernetes Deployment without pods for the time of the block."""
    selector = json.loads(namespace.kubectl("get", "deployment", deployment, "--output=json"))["spec"]["selector"]
    labels = ",".join(f"{key}={value}" for key, value in selector["matchLabels"].items())
    namespace.kubectl("scale", f"deployment/{deployment}", "--replicas=0")
    try:
        namespace.until(lambda: not namespace.names("pods", labels), f"{deployment} is away", 90)
        yield
    finally:
        back(namespace, deployment)


def back(namespace: Namespace, deployment: str) -> None:
    """Have it again, and wait until it is ready."""
    namespace.kubectl("scale", f"deployment/{deployment}", "--replicas=1")
    namespace.kubectl("rollout", "status", f"deployment/{deployment}", "--timeout=180s", timeout=200)

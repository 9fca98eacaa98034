"""The faults: a function that does each, the final states that are right, and the seconds that are promised."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from processes import SIGNAL
from trials import (
    ORPHAN_SECONDS,
    Row,
    Trial,
    at_once,
    cluster_starting,
    computing,
    fault_has_begun,
    in_state,
    nothing_to_do,
)
from world import World, back, scaled_to_zero

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Commands that do something to the cluster under test: restart its API server; stop the kubelet until its node is
# not ready, and let it go on. Without a command its row is not run.
RESTART_API = os.environ.get("CHAOS_RESTART_API", "")
STOP_KUBELET = os.environ.get("CHAOS_STOP_KUBELET", "")

COMPLETED, FAILED, CRASHED, CANCELLED = "COMPLETED", "FAILED", "CRASHED", "CANCELLED"
# A driver that died: the server hears of it.
LOST_SECONDS = 60.0
# A run whose fault is survived: the rest of its items, on a busy node.
SURVIVED_SECONDS = 300.0
# A pod that cannot start: the job variable `start_timeout_seconds` of these rows, and the notice.
CANNOT_START = {"start_timeout_seconds": 60}
CANNOT_START_SECONDS = 100.0

TERM, KILL = "15", "9"


def signalled(which: str, number: str) -> Callable[[Trial], None]:
    """Return the fault that a process of the driver gets a signal."""
    return lambda trial: trial.execute(trial.driver(), SIGNAL, which, number)


def began_by_itself(trial: Trial) -> None:
    """Take the begin of a fault that the flow makes itself from the store."""
    trial.fault_at = trial.world.stored(trial.run_id)["fault"]


def driver_deleted(trial: Trial) -> None:
    """Delete the driver pod, which gets SIGTERM and its grace period."""
    trial.world.platform.runs.kubectl("delete", "pod", trial.driver(), "--wait=false")


def driver_forced(trial: Trial) -> None:
    """Delete the driver pod at once, as after the loss of its node."""
    trial.world.platform.runs.kubectl("delete", "pod", trial.driver(), "--grace-period=0", "--force")


def driver_evicted(trial: Trial) -> None:
    """Evict the driver pod as `kubectl drain` does."""
    runs, pod = trial.world.platform.runs, trial.driver()
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": runs.name}}
    path = f"/api/v1/namespaces/{runs.name}/pods/{pod}/eviction"
    runs.kubectl("create", f"--raw={path}", "--filename=-", text=json.dumps(eviction))


def job_deleted(trial: Trial) -> None:
    """Delete the run's Job."""
    selector = f"prefect.io/flow-run-id={trial.run_id}"
    trial.world.platform.runs.kubectl("delete", "job", f"--selector={selector}", "--wait=false")


def cancelled(trial: Trial) -> None:
    """Cancel the run as a person does in the UI."""
    trial.world.set_state(trial.run_id, type="CANCELLING", name="Cancelling")


def cancelled_by_itself_later(trial: Trial) -> None:
    """Cancel a run that hangs by now."""
    # Its other processes send a last heartbeat, and all items of this moment hang.
    time.sleep(3)
    trial.begins()
    cancelled(trial)


def workers_forced(every: bool) -> Callable[[Trial], None]:  # noqa: FBT001 - read in the table below
    """Return the fault that one worker pod or all of them are deleted at once."""

    def inject(trial: Trial) -> None:
        names = trial.dask("worker")[: None if every else 1]
        trial.world.platform.runs.kubectl("delete", "pod", *names, "--grace-period=0", "--force")

    return inject


def scheduler_killed(trial: Trial) -> None:
    """Kill the Dask scheduler's process; the kubelet starts another one in the same pod."""
    [scheduler] = trial.dask("scheduler")
    try:
        trial.execute(scheduler, SIGNAL, "main", KILL)
    except RuntimeError as error:
        # Its end is the container's, and sometimes that of the command in it, too.
        if "ended with 137" not in str(error):
            raise


def scheduler_forced(trial: Trial) -> None:
    """Delete the Dask scheduler's pod at once; its Deployment makes another one."""
    [scheduler] = trial.dask("scheduler")
    trial.world.platform.runs.kubectl("delete", "pod", scheduler, "--grace-period=0", "--force")


def away(deployment: str, seconds: float) -> Callable[[Trial], None]:
    """Return the fault that a part of the platform is away for so long, from a moment in which a run computes."""

    def inject(trial: Trial) -> None:
        with scaled_to_zero(trial.world.platform.namespace, deployment):
            time.sleep(seconds)

    return inject


@contextmanager
def operator_away(world: World) -> Iterator[None]:
    """Have no operator while runs start."""
    with scaled_to_zero(world.platform.namespace, "tidepool-operator"):
        yield


def operator_back(trial: Trial) -> None:
    """Bring the operator back after half a minute."""
    time.sleep(30)
    back(trial.world.platform.namespace, "tidepool-operator")


def operator_leaves(trial: Trial) -> None:
    """Take the operator away until the run has ended and its pods should be gone."""
    with scaled_to_zero(trial.world.platform.namespace, "tidepool-operator"):
        trial.until(trial.final, "the run has ended", SURVIVED_SECONDS)
        time.sleep(ORPHAN_SECONDS)


@contextmanager
def prefect_worker_away(world: World) -> Iterator[None]:
    """Have the Prefect worker again when the runs are measured: their fault takes it away."""
    try:
        yield
    finally:
        back(world.platform.namespace, "tidepool-worker")


@contextmanager
def prefect_worker_absent(world: World) -> Iterator[None]:
    """Have no Prefect worker: a run stays Scheduled."""
    with scaled_to_zero(world.platform.namespace, "tidepool-worker"):
        yield


def prefect_worker_leaves_then_drivers(trial: Trial) -> None:
    """Take the Prefect worker away, then kill the drivers' pods."""
    namespace = trial.world.platform.namespace
    namespace.kubectl("scale", "deployment/tidepool-worker", "--replicas=0")
    prefect_worker_killed(trial)
    for each in trial.batch:
        each.begins()
        driver_forced(each)


def prefect_worker_killed(trial: Trial) -> None:
    """Kill the Prefect worker's pod; its Deployment makes another one."""
    labels = "app.kubernetes.io/component=worker"
    trial.world.platform.namespace.kubectl("delete", "pod", f"--selector={labels}", "--grace-period=0", "--force")


@contextmanager
def without_redis(world: World) -> Iterator[None]:
    """Have the leases in the server's memory."""
    upgraded(world, "")
    try:
        yield
    finally:
        upgraded(world, "redis")


def upgraded(world: World, redis: str) -> None:
    """Upgrade the release."""
    from test_upgrade import upgrade

    upgrade(world.platform, f"--set=redis.host={redis}")
    # Requests go through a connection to the pod that leaves.
    of_server = "app.kubernetes.io/component=server"
    world.platform.until(
        lambda: len(world.platform.namespace.get("pods", of_server)) == 1, "the old server is gone", 120
    )
    world.platform.read("health")


@contextmanager
def quota(world: World) -> Iterator[None]:
    """Allow no further pod in the runs' namespace."""
    runs = world.platform.runs
    used = sum(each["status"]["phase"] in {"Pending", "Running"} for each in runs.get("pods"))
    metadata = {"name": "chaos"}
    spec = {"hard": {"pods": str(used)}}
    runs.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": spec})
    try:
        # The controller has counted; before that nothing is refused for the right reason.
        runs.until(lambda: runs.get("resourcequotas")[0].get("status", {}).get("hard"), "the quota counts", 30)
        yield
    finally:
        runs.kubectl("delete", "resourcequota", "chaos")


def store_signalled(world: World, name: str) -> None:
    """Send a signal to the store's server."""
    script = f"kill -{name} $(pidof versitygw)"
    world.platform.namespace.kubectl("exec", "deployment/store", "--container=store", "--", "sh", "-c", script)


def store_stopped(seconds: float) -> Callable[[Trial], None]:
    """Return the fault that the store accepts connections and answers nothing."""

    def inject(trial: Trial) -> None:
        store_signalled(trial.world, "STOP")
        try:
            time.sleep(seconds)
        finally:
            store_signalled(trial.world, "CONT")

    return inject


def store_slow(trial: Trial) -> None:
    """Have the store answer in a tenth of each second, for a minute."""
    # In one command: each exec takes a third of a second.
    step = "kill -STOP $(pidof versitygw); sleep 0.9; kill -CONT $(pidof versitygw); sleep 0.1"
    script = f"n=0; while [ $n -lt 60 ]; do {step}; n=$((n+1)); done"
    namespace = trial.world.platform.namespace
    try:
        namespace.kubectl("exec", "deployment/store", "--container=store", "--", "sh", "-c", script, timeout=180)
    finally:
        store_signalled(trial.world, "CONT")


def done_by(script: str) -> Callable[[Trial], None]:
    """Return the fault that a command does to the cluster."""

    def inject(_trial: Trial) -> None:
        subprocess.run(["bash", "-c", script], check=True, timeout=300)

    return inject


def no_image(world: World) -> str:
    """Return the name of an image that the registry does not have."""
    return f"{world.platform.image.partition('@')[0]}@sha256:{'0' * 64}"


def _survived(inject: Callable[[Trial], None], **changes: Any) -> Row:
    """Return the row of a fault that a run outlives."""
    return Row(**{"inject": inject, "expected": (COMPLETED,), "seconds": SURVIVED_SECONDS, "from_end": True, **changes})


def _lost(inject: Callable[[Trial], None], says: str, **changes: Any) -> Row:
    """Return the row of a fault that ends the driver."""
    return Row(**{"inject": inject, "expected": (CRASHED,), "seconds": LOST_SECONDS, "says": says, **changes})


def _cancel(when: Callable[[Trial], bool], **changes: Any) -> Row:
    """Return the row of a run that is cancelled at a moment."""
    return Row(**{"inject": cancelled, "expected": (CANCELLED,), "seconds": 60.0, "when": when, **changes})


def _cannot_start(says: str, **changes: Any) -> Row:
    """Return the row of a run whose pod cannot start; it has a minute before it is given up."""
    return Row(
        **{
            "inject": nothing_to_do, "expected": (CRASHED,), "seconds": CANNOT_START_SECONDS, "says": says,
            "when": at_once, "variables": CANNOT_START, "from_end": True, **changes,
        }
    )  # fmt: skip


def _by_itself(fault: str) -> dict[str, Any]:
    """Return the part of a row whose flow makes its fault."""
    return {"when": fault_has_begun, "parameters": {"fault": fault}}


# Items for as long as the fault lasts, and some more: two workers do two each second.
LONG, LONGER = {"count": 180}, {"count": 480}
# By the policy; without it the run stays Crashed.
RETRIED: dict[str, Any] = {"variables": {"on_crash": "retry 1"}, "passing": (CRASHED,), "parameters": {"keep": True}}
# Names of the state in which a run waits for its pod.
WAITING = ("InfrastructurePending", "InfrastructureWaiting")
BIG = {"cpu_request": "90"}

ROWS: dict[str, Row] = {
    # The driver dies. 20 trials of each of the first ten.
    "engine-sigkill": _lost(signalled("engine", KILL), "SIGKILL"),
    "supervisor-sigkill": _lost(signalled("main", KILL), "SIGKILL"),
    "driver-oom": _lost(began_by_itself, "out of memory", **_by_itself("driver-oom")),
    "pod-forced": _lost(driver_forced, "pod deleted"),
    "pod-deleted": _lost(driver_deleted, "deleted"),
    "pod-evicted": _lost(driver_evicted, "evicted"),
    "job-deleted": _lost(job_deleted, "deleted"),
    "engine-sigterm": _lost(signalled("engine", TERM), "termination signal"),
    "supervisor-sigterm": _lost(signalled("main", TERM), "SIGTERM"),
    "driver-killed-worker-away": _lost(
        prefect_worker_leaves_then_drivers, "pod deleted", around=prefect_worker_away, of_platform=True, parameters=LONG
    ),
    "engine-sigkill-retry": _survived(signalled("engine", KILL), **RETRIED),
    "pod-forced-retry": _survived(driver_forced, **RETRIED),
    # A person cancels.
    "cancel-computing": _cancel(computing),
    "cancel-hung-driver": _cancel(
        fault_has_begun, inject=cancelled_by_itself_later, parameters={"fault": "driver-hung"}
    ),
    "cancel-hung-workers": _cancel(
        fault_has_begun, inject=cancelled_by_itself_later, parameters={"fault": "worker-hung"}
    ),
    "cancel-cluster-starting": _cancel(cluster_starting),
    "cancel-scheduled": _cancel(in_state("Scheduled", "Late"), around=prefect_worker_absent),
    "cancel-pending": _cancel(in_state("Pending", "Submitting", *WAITING)),
    "cancel-infrastructure-pending": _cancel(in_state(*WAITING)),
    "cancel-cannot-start": _cancel(in_state(*WAITING), variables=BIG),
    # Dask loses a part.
    "worker-forced": _survived(workers_forced(every=False)),
    "workers-forced": _survived(workers_forced(every=True)),
    "worker-oom": _survived(began_by_itself, **_by_itself("worker-oom")),
    "worker-disk-full": _survived(
        began_by_itself, **_by_itself("worker-disk"), variables={"env": {"TIDEPOOL_KUBERNETES_SCRATCH_GIB": "0.2"}}
    ),
    "worker-poisoned": _survived(
        began_by_itself, expected=(FAILED, CRASHED), says="killed", **_by_itself("worker-poisoned")
    ),
    "scheduler-killed": _survived(scheduler_killed, expected=(FAILED, CRASHED), seconds=120.0, says="scheduler"),
    "scheduler-forced": _survived(scheduler_forced, expected=(FAILED, CRASHED), seconds=120.0, says="scheduler"),
    # A part of the platform is away.
    "operator-away-before": _survived(operator_back, of_platform=True, when=at_once, around=operator_away),
    "operator-away-during": _survived(away("tidepool-operator", 5), of_platform=True, parameters=LONG),
    "operator-away-after": _survived(operator_leaves, of_platform=True, parameters=LONG),
    "server-away-30": _survived(away("tidepool-server", 30), of_platform=True, parameters=LONG),
    "server-away-180": _survived(away("tidepool-server", 180), of_platform=True, parameters=LONGER, seconds=480.0),
    "server-away-30-no-redis": _survived(
        away("tidepool-server", 30), of_platform=True, parameters=LONG, around=without_redis
    ),
    "server-away-180-no-redis": _survived(
        away("tidepool-server", 180), of_platform=True, parameters=LONGER, seconds=480.0, around=without_redis
    ),
    "kubernetes-api-restarted": _survived(done_by(RESTART_API), of_platform=True, parameters=LONG),
    # Not ready, and back before Kubernetes evicts: its runs are not lost.
    "node-not-ready": _survived(done_by(STOP_KUBELET), of_platform=True, parameters=LONG, seconds=480.0),
    "prefect-worker-killed-before-job": _survived(
        prefect_worker_killed, of_platform=True, when=in_state("Pending", "Submitting")
    ),
    "prefect-worker-killed-running": _survived(prefect_worker_killed, of_platform=True, parameters=LONG),
    "store-away-60": _survived(store_stopped(60), of_platform=True, parameters=LONG),
    "store-slow-60": _survived(store_slow, of_platform=True, parameters=LONG),
    # The run cannot start.
    "quota": _cannot_start("quota chaos: pods", around=quota, of_platform=True),
    "image-missing": _cannot_start("cannot be pulled", variables={**CANNOT_START, "image": no_image}),
    "unschedulable": _cannot_start("no node has 90 CPU free", variables={**CANNOT_START, **BIG}),
}  # fmt: skip

# Rows that this suite cannot run, with the reason.
NOT_RUN: dict[str, str] = {
    "node-lost": (
        "the test cluster has one node: what takes it away for good takes the platform with it, and nothing can be "
        "measured of a run that goes on elsewhere"
    ),
}
for _row, _variable, _command in (
    ("kubernetes-api-restarted", "CHAOS_RESTART_API", RESTART_API),
    ("node-not-ready", "CHAOS_STOP_KUBELET", STOP_KUBELET),
):
    if not _command:
        NOT_RUN[_row] = f"there is no command for it in {_variable}"

# Those that stock is measured by, too: the most common ones. Its message and its promises are its own.
STOCK = ("engine-sigkill", "driver-oom", "pod-deleted", "cancel-computing", "worker-forced")


def undo(world: World) -> None:
    """Bring back what an interrupted session has taken away."""
    namespace = world.platform.namespace
    for name in ("tidepool-server", "tidepool-operator", "tidepool-worker"):
        back(namespace, name)
    with suppress(RuntimeError):
        world.platform.runs.kubectl("delete", "resourcequota", "chaos", "--ignore-not-found")
    store_signalled(world, "CONT")

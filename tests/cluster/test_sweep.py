"""Nothing is left behind: each of three ways to delete a Dask cluster, with the other two off, and many at once."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import kr8s.asyncio
import pytest
from drive import drive
from installed import TOP
from kube import DASK_KINDS, Namespace, command

from tidepool.operate.sweep import leftovers as rules
from tidepool.operate.sweep import loop
from tidepool.operate.sweep.observation import ReadingError, observe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from drive import Driver
    from installed import Platform

# The promise is a minute; the rest of it is the kubelet's.
SECONDS = 60
# A driver that is told what to do by a file: `close` its cluster and live on, or `die` like after a SIGKILL.
SCRIPT = """
import logging, os, time
from tidepool.compute.clusters.kubernetes.cluster import KubernetesCluster
from tidepool.settings import settings
logging.basicConfig(level=logging.INFO)
def told(what):
    return os.path.exists(f"/tmp/{what}")
with KubernetesCluster(settings().size("small")):
    while not told("close"):
        time.sleep(0.1)
        if told("die"):
            os._exit(137)
print("closed", flush=True)
time.sleep(600)
"""


def started(installation: Platform) -> Driver:
    driver = drive(installation, SCRIPT)
    installation.until(lambda: "is ready" in driver.log(), "its cluster is ready", 180)
    return driver


def pod_of(driver: Driver) -> str:
    [pod] = driver.platform.runs.get("pods", f"job-name={driver.name}")
    return str(pod["metadata"]["name"])


def tell(driver: Driver, what: str) -> None:
    driver.platform.runs.kubectl("exec", pod_of(driver), "--", "touch", f"/tmp/{what}")


def gone(installation: Platform, what: str) -> None:
    began = time.monotonic()
    pods = "dask.org/cluster-name"
    installation.until(lambda: not installation.runs.names("pods", pods), f"no Dask pod is left after {what}", SECONDS)
    sys.__stderr__.write(f"{what}: no Dask pod after {time.monotonic() - began:.1f} s\n")
    installation.until(lambda: not installation.runs.dask(), f"no Dask object is left after {what}", 30)


@pytest.fixture
def no_operator(installation: Platform) -> Iterator[Callable[[], None]]:
    """Stops the operator, and with it the loop, until the end of the test."""
    namespace, selector = installation.namespace, "app.kubernetes.io/component=operator"

    def stop() -> None:
        namespace.kubectl("scale", "deployment/tidepool-operator", "--replicas=0")
        namespace.until(lambda: not namespace.names("pods", selector), "the operator is gone", 90)

    yield stop
    namespace.kubectl("scale", "deployment/tidepool-operator", "--replicas=1")
    namespace.kubectl("rollout", "status", "deployment/tidepool-operator", "--timeout=180s", timeout=200)


def test_the_driver_alone_deletes_its_cluster(installation: Platform, no_operator: Callable[[], None]) -> None:
    """Its Job stays, and there is no operator."""
    driver = started(installation)
    no_operator()
    tell(driver, "close")
    gone(installation, "the driver's own close")
    assert "closed" in driver.log()
    installation.runs.kubectl("delete", "job", driver.name)


def test_kubernetes_alone_deletes_a_cluster_with_its_job(
    installation: Platform, no_operator: Callable[[], None]
) -> None:
    """The driver does not close it, and there is no operator."""
    driver = started(installation)
    no_operator()
    tell(driver, "die")
    assert driver.wait(60)[0] is False
    assert installation.runs.names("daskclusters"), "the driver closed it, so this shows nothing"
    installation.runs.kubectl("delete", "job", driver.name)
    gone(installation, "the deletion of its Job")


def die(driver: Driver) -> None:
    tell(driver, "die")


def force_delete(driver: Driver) -> None:
    driver.platform.runs.kubectl("delete", "pod", pod_of(driver), "--force", "--grace-period=0", "--wait=false")


@pytest.mark.parametrize("end", [die, force_delete])
def test_the_loop_alone_deletes_the_cluster_of_a_driver_that_died(
    installation: Platform, end: Callable[[Driver], None]
) -> None:
    """The driver does not close it, and its Job stays for an hour."""
    driver = started(installation)
    end(driver)
    gone(installation, f"{end.__name__} of its driver")
    assert f"Job/{driver.name}" in installation.runs.names("jobs"), "Kubernetes deleted it with its owner"
    assert "closed" not in (driver.log() if end is die else "")
    log = installation.namespace.kubectl("logs", "deployment/tidepool-operator", "--tail=400")
    assert "deleted: its driver pod" in log


def test_the_loop_alone_deletes_parts_without_a_cluster(installation: Platform) -> None:
    """Of a cluster that is deleted without what it owns; the driver lives."""
    driver = started(installation)
    [cluster] = installation.runs.names("daskclusters")
    installation.runs.kubectl("delete", cluster.lower(), "--cascade=orphan")
    gone(installation, "the deletion of a cluster without its parts")
    tell(driver, "close")
    installation.runs.kubectl("delete", "job", driver.name)


# --- many, without an operator: the loop runs here --------------------------------------------------------------------

MANY = 200
OURS = {"app.kubernetes.io/part-of": "tidepool", "app.kubernetes.io/managed-by": "tidepool"}
GROUP = {"apiVersion": "kubernetes.dask.org/v1"}
ENDED = str(UUID(int=1))
Object = dict[str, Any]


@pytest.fixture(scope="module")
def synthetic() -> Iterator[Namespace]:
    """A namespace that no operator watches."""
    command("kubectl", "apply", "--server-side", "--kustomize", str(TOP / "k8s/crds"))
    namespace = Namespace(f"tidepool-test-{uuid4().hex[:6]}")
    command("kubectl", "create", "namespace", namespace.name)
    namespace.get(DASK_KINDS)  # waits until the server has the storage of kinds that are new
    try:
        yield namespace
    finally:
        command("kubectl", "delete", "namespace", namespace.name, "--timeout=180s", timeout=240)


def pod(name: str) -> Object:
    """A pod that finds no node: it lives, and costs nothing."""
    container = {"name": "x", "image": "x"}
    spec = {"nodeSelector": {"no": "node"}, "containers": [container], "restartPolicy": "Never"}
    labels = {"app.kubernetes.io/component": "flow-run"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def job(name: str, **spec: Any) -> Object:
    template = {"spec": pod(name)["spec"]}
    spec = {"template": template, "backoffLimit": 0, **spec}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def cluster(name: str, **metadata: Any) -> Object:
    labels = OURS | metadata.pop("labels", {"tidepool.dev/flow-run-id": "none"})
    empty: Object = {"spec": {"containers": []}}
    spec = {"worker": empty, "scheduler": empty | {"service": {}}}
    return {**GROUP, "kind": "DaskCluster", "metadata": {"name": name, "labels": labels, **metadata}, "spec": spec}


def driven_by(driver: str) -> Object:
    return {"annotations": {"tidepool.dev/driver": driver}}


def owned_by(job: Object) -> Object:
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
    return {"ownerReferences": [owner]}


def group(name: str) -> Object:
    metadata = {"name": f"{name}-default", "labels": OURS | {"dask.org/cluster-name": name}}
    worker: Object = {"spec": {"containers": []}}
    return {**GROUP, "kind": "DaskWorkerGroup", "metadata": metadata, "spec": {"cluster": name, "worker": worker}}


@pytest.fixture(scope="module")
def half_dead(synthetic: Namespace) -> tuple[set[str], set[str]]:
    """200 clusters of ten kinds, half of them dead; returns the names of the objects that live, and of the dead."""
    kinds, each_kind = 10, MANY // 10
    drivers = [pod(f"pod-{n}") for n in range(each_kind)]
    drivers += [job(f"alive-{n}", suspend=True) for n in range(each_kind)]
    drivers += [job(f"ended-{n}", activeDeadlineSeconds=1) for n in range(each_kind)]
    synthetic.apply({"apiVersion": "v1", "kind": "List", "items": drivers})
    of = {each["metadata"]["name"]: each for each in synthetic.get("jobs")}
    foreign, shared = {"labels": {}}, {"labels": {"tidepool.dev/shared-cluster": "warm"}}
    alive, dead = [], []
    for n in range(each_kind):
        alive += [
            cluster(f"driver-{n}", **driven_by(f"pod-{n}")),
            cluster(f"job-{n}", **owned_by(of[f"alive-{n}"])),
            cluster(f"elsewhere-{n}"),
            cluster(f"shared-{n}", **shared, **driven_by("gone")),
            cluster(f"foreign-{n}", **driven_by("gone")),
        ]
        alive[-1]["metadata"] |= foreign
        dead += [
            cluster(f"no-driver-{n}", **driven_by(f"gone-{n}")),
            cluster(f"ended-{n}", **owned_by(of[f"ended-{n}"])),
            cluster(f"no-driver-but-job-{n}", **driven_by(f"gone-{n}"), **owned_by(of[f"alive-{n}"])),
            cluster(f"run-over-{n}", labels={"tidepool.dev/flow-run-id": ENDED}, **driven_by(f"pod-{n}")),
            cluster(f"deadline-{n}", annotations={"tidepool.dev/deadline-seconds": "1"}),
        ]
    assert len(alive) + len(dead) == MANY == kinds * each_kind
    groups_alive, groups_dead = [group(f"driver-{n}") for n in range(5)], [group(f"without-{n}") for n in range(5)]
    items = [*alive, *dead, *groups_alive, *groups_dead]
    synthetic.apply({"apiVersion": "v1", "kind": "List", "items": items})

    def failed() -> bool:
        due = [each for each in synthetic.get("jobs") if each["metadata"]["name"].startswith("ended-")]
        ends = [[one["type"] for one in each["status"].get("conditions", [])] for each in due]
        return len(ends) == each_kind and all("Failed" in each for each in ends)

    synthetic.until(failed, "the Jobs with a deadline of a second have failed", 120)

    def names(objects: list[Object]) -> set[str]:
        return {f"{each['kind']}/{each['metadata']['name']}" for each in objects}

    return names([*alive, *groups_alive]), names([*dead, *groups_dead])


def existing(synthetic: Namespace) -> set[str]:
    return synthetic.names("daskclusters,daskworkergroups")


def one_pass(namespace: Namespace, finished: dict[str, datetime], kubeconfig: str) -> int:
    async def run() -> int:
        api = await kr8s.asyncio.api(kubeconfig=kubeconfig)
        return len([each async for each in loop.delete_leftovers(api, await observe(api, namespace.name), finished)])

    return asyncio.run(run())


def limited(synthetic: Namespace, folder: Path, *left_out: str) -> str:
    """Return a kubeconfig of an account that may do what the operator may, but for listing some resources."""
    rendered = command(
        "helm", "template", "tidepool", str(TOP / "helm/tidepool"), "--namespace", synthetic.name,
        "--kube-version=1.34", "--set=registration.enabled=false", "--show-only=templates/operator/role.yaml",
    )  # fmt: skip
    name = f"operator-without-{'-'.join(left_out) or 'nothing'}"
    synthetic.apply(rendered)
    role = json.loads(synthetic.kubectl("get", "role", "tidepool-operator", "--output=json"))
    rules = [each for each in role["rules"] if not set(each["resources"]) & set(left_out)]
    made = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": name}, "rules": rules}
    synthetic.apply(made)
    synthetic.kubectl("create", "serviceaccount", name)
    synthetic.kubectl("create", "rolebinding", name, f"--role={name}", f"--serviceaccount={synthetic.name}:{name}")
    token = synthetic.kubectl("create", "token", name).strip()
    config = json.loads(command("kubectl", "config", "view", "--raw", "--minify", "--output=json"))
    config["users"][0]["user"] = {"token": token}
    path = folder / name
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("unreadable", ["jobs", "pods", "daskclusters", "services", "events"])
def test_nothing_goes_while_something_cannot_be_read(
    unreadable: str, synthetic: Namespace, half_dead: tuple[set[str], set[str]], tmp_path: Path
) -> None:
    """The API server refuses one of the readings."""
    account = limited(synthetic, tmp_path, unreadable)
    with pytest.raises(ReadingError, match=f"refused to read {unreadable} .* cannot list"):
        one_pass(synthetic, {}, account)
    assert existing(synthetic) == half_dead[0] | half_dead[1]


def test_exactly_the_dead_half_of_200_clusters_goes(
    synthetic: Namespace, half_dead: tuple[set[str], set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rights of the operator; first while the Prefect server cannot be read: what only that knows stays."""
    alive, dead = half_dead
    known_by_prefect = {each for each in dead if "run-over" in each}
    account = limited(synthetic, tmp_path)
    began = time.monotonic()
    assert one_pass(synthetic, {}, account) == len(dead - known_by_prefect)
    sys.__stderr__.write(f"{len(dead - known_by_prefect)} deleted in {time.monotonic() - began:.1f} s\n")
    synthetic.until(lambda: existing(synthetic) == alive | known_by_prefect, "all dead are gone but these", 60)

    ended = {ENDED: datetime.now(UTC)}
    assert one_pass(synthetic, ended, account) == 0, "the driver lives, and has a minute to close its cluster"
    monkeypatch.setattr(rules, "_CLOSING", timedelta(0))
    assert one_pass(synthetic, ended, account) == len(known_by_prefect)
    synthetic.until(lambda: existing(synthetic) == alive, "the other half is alive", 60)
    assert one_pass(synthetic, ended, account) == 0, "a second pass finds nothing"

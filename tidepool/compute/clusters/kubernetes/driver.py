"""The run and the driver pod that a Dask cluster belongs to, and what its own pods inherit from them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tidepool.settings import KubernetesSettings

# Variables that identify the driver; a Dask pod is another one.
_DRIVERS_OWN = re.compile(
    r"TIDEPOOL_KUBERNETES_(NAMESPACE|POD_NAME|JOB_NAME|JOB_UID|IMAGE|EARLY_CLUSTER)"
    r"|PREFECT__.*|PREFECT_FLOW_RUN_EXECUTE_.*"
)
# Libraries that driver, scheduler and workers must have in the same version: they exchange pickles.
PACKAGES = ("cloudpickle", "dask", "distributed", "msgpack", "numpy", "pandas", "prefect", "prefect-dask", "tidepool")
# The kubelet reports the digest of an image a moment after its container's start; a loaded image has none.
DIGEST_SECONDS = 1.0
# Kubernetes adds these to every pod.
_AUTOMATIC_TOLERATIONS = {"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}


@dataclass(frozen=True)
class Run:
    """The run that a cluster is for."""

    id: str = ""  # empty outside of a flow run
    flow: str = "adhoc"
    attempt: int = 1  # 2 for the first retry, …; 0: not known


def this_run() -> Run:
    """Return the flow run that this process executes; without an id outside of one."""
    from prefect.runtime import flow_run

    if not flow_run.id:
        return Run()
    return Run(str(flow_run.id), flow_run.flow_name or "adhoc", max(flow_run.run_count or 1, 1))


@dataclass(frozen=True)
class Driver:
    """The configuration that Dask pods inherit from the driver: parts of a pod's spec."""

    image: str  # by digest where the node knows it
    env: list[dict[str, Any]] = field(default_factory=list)
    env_from: list[dict[str, Any]] = field(default_factory=list)
    placement: dict[str, Any] = field(default_factory=dict)  # nodeSelector, tolerations, affinity, imagePullSecrets, …
    owner: tuple[str, str] | None = None  # name and uid of the run's Job, with which Kubernetes deletes the cluster
    deployment: str = ""  # of Prefect, from the label of its pods
    uid: str = ""  # of the driver's pod; empty outside of one


def driver_of(pod: Mapping[str, Any], settings: KubernetesSettings) -> Driver:
    """Return what a driver's pod passes on; the settings may have name and uid of its Job, from the downward API."""
    spec = pod["spec"]
    container = spec["containers"][0]
    keep = ("nodeSelector", "affinity", "priorityClassName", "imagePullSecrets")
    placement = {name: spec[name] for name in keep if spec.get(name)}
    tolerations = [each for each in spec.get("tolerations", []) if each.get("key") not in _AUTOMATIC_TOLERATIONS]
    if tolerations:
        placement["tolerations"] = tolerations
    owners = {each["kind"]: (each["name"], each["uid"]) for each in pod["metadata"].get("ownerReferences", [])}
    return Driver(
        image=running_image(pod),
        env=[each for each in container.get("env", []) if not _DRIVERS_OWN.fullmatch(each["name"])],
        env_from=container.get("envFrom", []),
        placement=placement,
        owner=(settings.job_name, settings.job_uid) if settings.job_uid else owners.get("Job"),
        deployment=pod["metadata"].get("labels", {}).get("prefect.io/deployment-name", ""),
        uid=pod["metadata"].get("uid", ""),
    )


def running_image(pod: Mapping[str, Any]) -> str:
    """Return the image of a pod's first container: by digest (`name@sha256:…`) if it was pulled, else as in its spec.

    An image that was loaded into the node (kind, minikube) has no digest that another node could pull.
    """
    container = pod["spec"]["containers"][0]
    for status in pod.get("status", {}).get("containerStatuses", []):
        pulled: str = status.get("imageID", "").removeprefix("docker-pullable://")
        # kind names what it loads `docker.io/library/import-…@sha256:…`, which no registry has.
        if status["name"] == container["name"] and "@sha256:" in pulled and "/import-" not in pulled:
            return pulled
    return str(container["image"])


def digest(image: str) -> str:
    """Return the `sha256:…` of an image name, or the name itself without one: equal for equal images."""
    return image.rpartition("@")[2]


def in_one_line(versions: Mapping[str, Any]) -> str:
    """Return the versions that distributed reports for a process: `python 3.11.2.final.0, cloudpickle 3.1.1, …`."""
    packages = versions["packages"]
    return ", ".join([f"python {versions['host']['python']}", *(f"{name} {packages[name]}" for name in PACKAGES)])


def difference(ours: str, theirs: str) -> str:
    """Return the differences of two such lines, as `pandas 2.3.3 here, pandas 2.3.1 there`; empty without one."""
    pairs = zip(ours.split(", "), theirs.split(", "), strict=True)
    return "; ".join(f"{here} here, {there} there" for here, there in pairs if here != there)

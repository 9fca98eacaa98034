"""What a Dask cluster on Kubernetes looks like, as plain data: no API, no clock, no settings read.

A cluster is one `DaskCluster` object (kubernetes.dask.org/v1), from which the Dask operator makes the pods. They get
what the driver's pod has: the image by digest, the variables (secrets by reference), the pull secrets, the place.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tidepool.settings import KubernetesSettings, SizeSettings

GROUP = "kubernetes.dask.org/v1"
SCHEDULER_PORT = 8786
HTTP_PORT = 8787
WORKER_PORT = 8788

# Never prefect.io/flow-run-id: the operator copies labels to its pods, and Prefect's observer takes every pod that
# carries that label for a flow run's own.
LABEL_RUN = "tidepool.dev/flow-run-id"
LABEL_SHARED = "tidepool.dev/shared-cluster"
ANNOTATION_DEADLINE = "tidepool.dev/deadline"
ANNOTATION_DEPLOYMENT = "tidepool.dev/deployment"
ANNOTATION_IMAGE = "tidepool.dev/image"
ANNOTATION_VERSIONS = "tidepool.dev/versions"
ANNOTATION_WORKERS = "tidepool.dev/workers"

# The operator takes 53 characters, but adds 26 to name a worker, whose name is also a host's name of at most 63.
NAME_LENGTH = 36
# Variables of the driver that say who it is; a Dask pod is somebody else.
_DRIVERS_OWN = re.compile(
    r"TIDEPOOL_KUBERNETES_(NAMESPACE|POD_NAME|JOB_NAME|JOB_UID|IMAGE)|PREFECT__.*|PREFECT_FLOW_RUN_EXECUTE_.*"
)
_RESTRICTED_POD = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "runAsGroup": 10001,
    "fsGroup": 10001,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_RESTRICTED_CONTAINER = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
# Kubernetes gives these to every pod by itself.
_AUTOMATIC_TOLERATIONS = {"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}


@dataclass(frozen=True)
class Run:
    """Which run a cluster is for.

    Attributes:
        id: The flow run's id; empty outside of one.
        flow: The flow's name.
        attempt: 1 for the first execution of the run, 2 for its first retry, …
    """

    id: str = ""
    flow: str = "adhoc"
    attempt: int = 1


@dataclass(frozen=True)
class Driver:
    """What the Dask pods take over from the driver.

    Attributes:
        image: Image, by digest where the node knows it.
        env: Container variables, as Kubernetes has them.
        env_from: Whole ConfigMaps and Secrets as variables, as Kubernetes has them.
        placement: Pod fields: nodeSelector, tolerations, affinity, priorityClassName, imagePullSecrets.
        owner: (name, uid) of the run's Job, with which Kubernetes removes the cluster.
        deployment: Name of the deployment, as Prefect labels its pods with it; may be empty.
    """

    image: str
    env: list[dict[str, Any]] = field(default_factory=list)
    env_from: list[dict[str, Any]] = field(default_factory=list)
    placement: dict[str, Any] = field(default_factory=dict)
    owner: tuple[str, str] | None = None
    deployment: str = ""


def driver_of(pod: Mapping[str, Any], settings: KubernetesSettings) -> Driver:
    """What a driver's pod passes on.

    Args:
        pod: The pod as the API returns it.
        settings: Job name and uid (the downward API), image.

    """
    spec = pod["spec"]
    container = spec["containers"][0]
    keep = ("nodeSelector", "affinity", "priorityClassName", "imagePullSecrets")
    placement = {name: spec[name] for name in keep if spec.get(name)}
    tolerations = [each for each in spec.get("tolerations", []) if each.get("key") not in _AUTOMATIC_TOLERATIONS]
    if tolerations:
        placement["tolerations"] = tolerations
    owners = {each["kind"]: (each["name"], each["uid"]) for each in pod["metadata"].get("ownerReferences", [])}
    owner = (settings.job_name, settings.job_uid) if settings.job_uid else owners.get("Job")
    return Driver(
        image=running_image(pod),
        env=[dict(each) for each in container.get("env", []) if not _DRIVERS_OWN.fullmatch(each["name"])],
        env_from=[dict(each) for each in container.get("envFrom", [])],
        placement=placement,
        owner=owner,
        deployment=pod["metadata"].get("labels", {}).get("prefect.io/deployment-name", ""),
    )


def running_image(pod: Mapping[str, Any]) -> str:
    """The image that a pod's first container runs, by digest (`name@sha256:…`) when it was pulled, else as asked for.

    A locally loaded image (kind, minikube) has no digest that another node could pull.
    """
    container = pod["spec"]["containers"][0]
    for status in pod.get("status", {}).get("containerStatuses", []):
        pulled: str = status.get("imageID", "").removeprefix("docker-pullable://")
        # kind names what it loads `docker.io/library/import-…@sha256:…`, which is nowhere to be pulled from.
        if status["name"] == container["name"] and "@sha256:" in pulled and "/import-" not in pulled:
            return pulled
    asked: str = container["image"]
    return asked


def digest(image: str) -> str:
    """The `sha256:…` of an image name, or the name itself when it has none: what is equal for equal images."""
    return image.rpartition("@")[2]


def name_for(run: Run, suffix: str) -> str:
    """A cluster's name: the flow, the run, the attempt, and a random part, because one run may have several clusters.

    Args:
        run: The run.
        suffix: The random part, four characters.
    """
    tail = f"-{run.id[:8]}-{run.attempt}-{suffix}" if run.id else f"-{suffix}"
    return _slug(run.flow)[: NAME_LENGTH - len(tail)].strip("-") + tail


def shared_name(name: str, image: str) -> str:
    """The name of a shared cluster: a new image is another cluster, so a deploy never meets yesterday's workers."""
    tail = "-" + hashlib.sha256(digest(image).encode()).hexdigest()[:8]
    return f"shared-{_slug(name)}"[: NAME_LENGTH - len(tail)].strip("-") + tail


def check_caps(sizes: Iterable[SizeSettings], settings: KubernetesSettings) -> None:
    """Refuses more than one run may have.

    Args:
        sizes: All clusters that the run would have at a time.
        settings: The caps.

    Raises:
        UsageError: names what is asked for, the cap, and the setting that holds it.
    """
    clusters = list(sizes)
    asked = (
        ("workers", sum(each.workers for each in clusters), settings.max_workers, "MAX_WORKERS"),
        ("CPU cores", sum(each.workers * each.cpu for each in clusters), settings.max_cpu, "MAX_CPU"),
        (
            "GiB of memory",
            sum(each.workers * each.memory_gib for each in clusters),
            settings.max_memory_gib,
            "MAX_MEMORY_GIB",
        ),
    )
    for what, wanted, cap, setting in asked:
        if wanted > cap:
            raise UsageError(
                f"{wanted:g} {what} for the Dask workers of one run are more than the {cap:g} that "
                f"TIDEPOOL_KUBERNETES_{setting} allows; nothing was created"
            )
    for each in clusters:
        if settings.adaptive_minimum > each.workers:
            raise UsageError(
                f"TIDEPOOL_KUBERNETES_ADAPTIVE_MINIMUM is {settings.adaptive_minimum}, but the cluster may have at "
                f"most {each.workers} workers; nothing was created"
            )


def manifest(
    name: str,
    *,
    run: Run,
    driver: Driver,
    size: SizeSettings,
    settings: KubernetesSettings,
    dask_settings: Mapping[str, str],
    worker_variables: Mapping[str, str],
    versions: str,
    now: datetime,
    shared: str = "",
) -> dict[str, Any]:
    """The DaskCluster object.

    Args:
        name: As `name_for` or `shared_name` makes it.
        run: Whom it is for.
        driver: What its pods take over.
        size: Workers, and threads, cores and memory of each.
        settings: Timeouts, placement.
        dask_settings: Settings of the Dask scheduler, by their name under `distributed.scheduler`.
        worker_variables: What a nanny would set before it starts a worker: one thread per library.
        versions: The libraries that must be equal everywhere, one line as `preload.versions` makes it.
        now: The time of creation, with its zone.
        shared: The name under which runs share it; empty for a cluster of one run.
    """
    labels = {"app.kubernetes.io/part-of": "tidepool", "app.kubernetes.io/managed-by": "tidepool"}
    annotations = {
        ANNOTATION_IMAGE: driver.image,
        ANNOTATION_VERSIONS: versions,
        ANNOTATION_WORKERS: describe(size),
    }
    metadata: dict[str, Any] = {"name": name, "labels": labels, "annotations": annotations}
    if shared:
        labels[LABEL_SHARED] = _slug(shared)
    else:
        labels[LABEL_RUN] = run.id or "none"
        annotations[ANNOTATION_DEPLOYMENT] = driver.deployment
        deadline = now + timedelta(seconds=settings.deadline_seconds)
        annotations[ANNOTATION_DEADLINE] = deadline.astimezone(UTC).isoformat(timespec="seconds")
        if driver.owner:
            # Not blocking: the Job may go at once, the cluster follows.
            metadata["ownerReferences"] = [
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "name": driver.owner[0],
                    "uid": driver.owner[1],
                    "blockOwnerDeletion": False,
                    "controller": False,
                }
            ]
    replicas = settings.adaptive_minimum or size.workers
    return {
        "apiVersion": GROUP,
        "kind": "DaskCluster",
        "metadata": metadata,
        "spec": {
            "idleTimeout": settings.idle_timeout_seconds,
            "scheduler": {"spec": _scheduler(driver, settings, dask_settings), "service": _service(name)},
            "worker": {"replicas": replicas, "spec": _worker(driver, size, settings, worker_variables)},
        },
    }


def worker_group(cluster: Mapping[str, Any]) -> dict[str, Any]:
    """The DaskWorkerGroup of a cluster that exists.

    The operator makes the same one, but later, and without an owner until it comes back to it: a cluster that is closed
    in between leaves its group behind. Made here, it has its owner at once, and workers start with the scheduler.

    Args:
        cluster: The DaskCluster as the API returned it, with its uid.
    """
    metadata = cluster["metadata"]
    labels = {**metadata["labels"], "dask.org/cluster-name": metadata["name"], "dask.org/component": "workergroup"}
    return {
        "apiVersion": GROUP,
        "kind": "DaskWorkerGroup",
        "metadata": {
            "name": f"{metadata['name']}-default",
            "labels": labels,
            "annotations": metadata["annotations"],
            "ownerReferences": [_owned_by(cluster)],
        },
        "spec": {"cluster": metadata["name"], "worker": cluster["spec"]["worker"]},
    }


def autoscaler(cluster: Mapping[str, Any], size: SizeSettings, settings: KubernetesSettings) -> dict[str, Any]:
    """The DaskAutoscaler of an adaptive cluster that exists: the operator asks the scheduler how many it wants."""
    name = cluster["metadata"]["name"]
    return {
        "apiVersion": GROUP,
        "kind": "DaskAutoscaler",
        "metadata": {"name": name, "ownerReferences": [_owned_by(cluster)]},
        "spec": {"cluster": name, "minimum": settings.adaptive_minimum, "maximum": size.workers},
    }


def _owned_by(cluster: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": GROUP,
        "kind": "DaskCluster",
        "name": cluster["metadata"]["name"],
        "uid": cluster["metadata"]["uid"],
    }


def describe(size: SizeSettings) -> str:
    """A size in words, for people and to compare."""
    return f"{size.workers} x {size.threads} threads, {size.cpu:g} CPU, {size.memory_gib:g} GiB"


def _python(module: str) -> list[str]:
    """The command of a module. `dask scheduler` is the same, after importing the commands of every other package."""
    return ["python", "-m", module]


def _scheduler(driver: Driver, settings: KubernetesSettings, dask_settings: Mapping[str, str]) -> dict[str, Any]:
    container = _container(
        "scheduler",
        driver,
        args=[
            *_python("distributed.cli.dask_scheduler"),
            "--host=0.0.0.0",
            f"--port={SCHEDULER_PORT}",
            # The HTTP server is on; the pages of the dashboard (a third of the start-up) come with the first visitor.
            f"--dashboard-address=:{HTTP_PORT}",
            "--no-dashboard",
            "--preload=tidepool.compute.clusters.preload.scheduler",
        ],
        env={
            "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES": str(list(_HTTP_ROUTES)),
            **{
                f"DASK_DISTRIBUTED__SCHEDULER__{name.upper().replace('-', '_')}": value
                for name, value in dask_settings.items()
            },
        },
        cpu=settings.scheduler_cpu,
        memory_gib=settings.scheduler_memory_gib,
    )
    container["ports"] = [
        {"name": "tcp-comm", "containerPort": SCHEDULER_PORT, "protocol": "TCP"},
        {"name": "http-dashboard", "containerPort": HTTP_PORT, "protocol": "TCP"},
    ]
    # For people and for the operator's autoscaler; nobody waits for it. No liveness probe: a scheduler that is killed
    # for being busy takes the run with it.
    container["readinessProbe"] = {
        "httpGet": {"port": "http-dashboard", "path": "/health"},
        "periodSeconds": 5,
        "timeoutSeconds": 10,
    }
    return _pod(container, driver.placement, scratch_gib=1)


def _worker(
    driver: Driver, size: SizeSettings, settings: KubernetesSettings, variables: Mapping[str, str]
) -> dict[str, Any]:
    container = _container(
        "worker",
        driver,
        args=[
            *_python("distributed.cli.dask_worker"),
            "--name=$(DASK_WORKER_NAME)",
            f"--nthreads={size.threads}",
            f"--worker-port={WORKER_PORT}",
            f"--memory-limit={round(size.memory_gib * 1024)}MiB",
            # Kubernetes restarts it, and shows an out-of-memory kill as what it is; a nanny hides it and costs 0.6 s.
            "--no-nanny",
            "--no-dashboard",
            "--preload=tidepool.compute.clusters.preload.worker",
        ],
        env=variables,
        cpu=size.cpu,
        memory_gib=size.memory_gib,
    )
    placement = dict(driver.placement)
    if settings.worker_node_selector:
        placement["nodeSelector"] = settings.worker_node_selector
        # The driver's affinity says where drivers go; it may exclude just these nodes.
        placement.pop("affinity", None)
    if settings.worker_tolerations:
        placement["tolerations"] = [*placement.get("tolerations", []), *settings.worker_tolerations]
    placement.pop("priorityClassName", None)
    if settings.worker_priority_class:
        placement["priorityClassName"] = settings.worker_priority_class
    return _pod(container, placement, scratch_gib=settings.scratch_gib)


_HTTP_ROUTES = (
    "tidepool.compute.clusters.preload.scheduler",
    "distributed.http.scheduler.prometheus",
    "distributed.http.scheduler.info",
    "distributed.http.scheduler.json",
    "distributed.http.scheduler.api",
    "distributed.http.health",
    "distributed.http.statics",
)


def _container(
    name: str, driver: Driver, *, args: list[str], env: Mapping[str, str], cpu: float, memory_gib: float
) -> dict[str, Any]:
    memory = f"{round(memory_gib * 1024)}Mi"
    return {
        "name": name,
        "image": driver.image,
        "imagePullPolicy": "IfNotPresent",
        "args": args,
        "env": [*driver.env, *({"name": key, "value": value} for key, value in env.items())],
        "envFrom": driver.env_from,
        # No CPU limit: a pod that starts may use what the node has free; the request is its share when it is full.
        "resources": {"requests": {"cpu": f"{round(cpu * 1000)}m", "memory": memory}, "limits": {"memory": memory}},
        "securityContext": _RESTRICTED_CONTAINER,
        # The reason of a failed start is then in the pod's status, without a log that may be gone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 - the pod's own, the only writable folder
    }


def _pod(container: dict[str, Any], placement: dict[str, Any], *, scratch_gib: float) -> dict[str, Any]:
    return {
        **placement,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _RESTRICTED_POD,
        "terminationGracePeriodSeconds": 10,
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": f"{round(scratch_gib * 1024)}Mi"}}],
    }


def _service(cluster: str) -> dict[str, Any]:
    return {
        "type": "ClusterIP",
        # Workers may connect as soon as the scheduler listens, not a probe and an endpoint update later.
        "publishNotReadyAddresses": True,
        "selector": {"dask.org/cluster-name": cluster, "dask.org/component": "scheduler"},
        "ports": [
            {"name": "tcp-comm", "protocol": "TCP", "port": SCHEDULER_PORT, "targetPort": "tcp-comm"},
            {"name": "http-dashboard", "protocol": "TCP", "port": HTTP_PORT, "targetPort": "http-dashboard"},
        ],
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"

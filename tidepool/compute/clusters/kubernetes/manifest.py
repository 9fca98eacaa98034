"""The Kubernetes objects of a Dask cluster, as plain data: no API, no clock, no settings read.

A cluster is one `DaskCluster` object, from which the Dask operator creates the pods. They inherit the configuration of
the driver's pod: the image by digest, the variables (secrets by reference), pull secrets and scheduling constraints.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Any

from tidepool.compute.clusters.kubernetes import names
from tidepool.compute.clusters.kubernetes.driver import digest
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tidepool.compute.clusters.kubernetes.certificate import Identity
    from tidepool.compute.clusters.kubernetes.driver import Driver, Run
    from tidepool.settings import KubernetesSettings, SizeSettings

# The operator takes 53 characters, but adds 26 to name a worker, whose name is also a host name of at most 63.
NAME_LENGTH = 36
_PORTS = {"tcp-comm": names.SCHEDULER_PORT, "http-dashboard": names.HTTP_PORT}
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
# The scheduler's HTTP server asks for no certificate: these only answer questions.
HTTP_ROUTES = (
    # Before distributed's own in the list: the first match answers.
    "tidepool.compute.clusters.preload.scheduler",
    "distributed.http.scheduler.prometheus",
    "distributed.http.scheduler.info",
    "distributed.http.scheduler.json",
    "distributed.http.health",
    "distributed.http.statics",
)
# With the one request that changes something, `retire_workers`: of an adaptive cluster's operator.
ADAPTIVE_HTTP_ROUTES = (*HTTP_ROUTES, "distributed.http.scheduler.api")
# What a nanny would set before it starts a worker (Dask's `distributed.nanny.pre-spawn-environ`): one thread for each
# library, because Dask has its own. A variable that the deployment sets stays.
WORKER_VARIABLES = {
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# Dask's own settings of the files in the pods. All roles: a task's client is one of its worker's process.
_TLS_VARIABLES = {
    "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True",
    "DASK_DISTRIBUTED__COMM__TLS__CA_FILE": f"{names.TLS_FOLDER}/tls.crt",
    **{
        f"DASK_DISTRIBUTED__COMM__TLS__{role}__{part}": f"{names.TLS_FOLDER}/tls.{suffix}"
        for role in ("SCHEDULER", "WORKER", "CLIENT")
        for part, suffix in (("CERT", "crt"), ("KEY", "key"))
    },
}


def name_for(run: Run, suffix: str, pod_uid: str = "") -> str:
    """Return a cluster's name: flow, run, attempt, a random suffix (one run may have several clusters), and its pod."""
    attempt = f"-{run.attempt}" if run.attempt else ""
    tail = f"-{run.id[:8]}{attempt}-{suffix}" if run.id else f"-{suffix}"
    tail += f"-{pod_uid[: names.UID_LENGTH]}" if pod_uid else ""
    return names.slug(run.flow)[: NAME_LENGTH - len(tail)].strip("-") + tail


def shared_name(name: str, image: str, key: str) -> str:
    """Return a shared cluster's name.

    It depends on the image and the key (empty without TLS): after a change of one, no run meets what it cannot use.
    """
    tail = "-" + hmac.digest(key.encode(), digest(image).encode(), "sha256").hex()[:8]
    return f"{names.SHARED_PREFIX}{names.slug(name)}"[: NAME_LENGTH - len(tail)].strip("-") + tail


def check_caps(sizes: Iterable[SizeSettings], settings: KubernetesSettings) -> None:
    """Refuse clusters that exceed together what one run may have at a time.

    Raises:
        UsageError: what is requested, the cap, and the setting that holds it.
    """
    clusters = list(sizes)
    for what, requested, setting in (
        ("workers", sum(each.workers for each in clusters), "max_workers"),
        ("CPU cores", sum(each.workers * each.cpu for each in clusters), "max_cpu"),
        ("GiB of memory", sum(each.workers * each.memory_gib for each in clusters), "max_memory_gib"),
    ):
        cap = getattr(settings, setting)
        if requested > cap:
            raise UsageError(
                f"{requested:g} {what} requested for the Dask workers of one run, above "
                f"TIDEPOOL_KUBERNETES_{setting.upper()}={cap:g}; nothing was created"
            )
    for size in clusters:
        if settings.adaptive_minimum > size.workers:
            raise UsageError(
                f"TIDEPOOL_KUBERNETES_ADAPTIVE_MINIMUM is {settings.adaptive_minimum}, but the cluster may have at "
                f"most {size.workers} workers; nothing was created"
            )


def manifest(
    name: str,
    *,
    run: Run,
    driver: Driver,
    size: SizeSettings,
    settings: KubernetesSettings,
    dask_settings: Mapping[str, str],
    shared: str = "",
    versions: str = "",
) -> dict[str, Any]:
    """Return the DaskCluster object.

    Args:
        name: From `name_for` or `shared_name`.
        run: The run that it is for.
        driver: What its pods inherit.
        size: Workers, and threads, cores and memory of each.
        settings: Timeouts, placement.
        dask_settings: Settings of the Dask scheduler, from `scheduler_settings`.
        shared: The name under which runs share it; empty for a cluster of one run.
        versions: Of a shared one, the libraries that must be equal in all its users, from `driver.in_one_line`.
    """
    labels = dict(names.OURS)
    annotations = {
        names.ANNOTATION_DEADLINE: str(settings.deadline_seconds),
        names.ANNOTATION_IMAGE: driver.image,
        names.ANNOTATION_WORKERS: (
            f"{size.workers} x {size.threads} threads, {size.cpu:g} CPU, {size.memory_gib:g} GiB"
        ),
    }
    metadata: dict[str, Any] = {"name": name, "labels": labels, "annotations": annotations}
    if settings.pod_name:
        annotations[names.ANNOTATION_DRIVER] = settings.pod_name
    if shared:
        labels[names.LABEL_SHARED] = names.slug(shared)
        annotations[names.ANNOTATION_VERSIONS] = versions
    else:
        labels[names.LABEL_RUN] = run.id or "none"
        annotations[names.ANNOTATION_DEPLOYMENT] = driver.deployment
        if driver.owner:
            # Not blocking: the Job may go at once, the cluster follows.
            owner = {"apiVersion": "batch/v1", "kind": "Job", "blockOwnerDeletion": False, "controller": False}
            metadata["ownerReferences"] = [owner | {"name": driver.owner[0], "uid": driver.owner[1]}]
    replicas = settings.adaptive_minimum or size.workers
    return {
        "apiVersion": names.GROUP,
        "kind": "DaskCluster",
        "metadata": metadata,
        "spec": {
            "idleTimeout": settings.idle_timeout_seconds,
            "scheduler": {"spec": _scheduler(name, driver, settings, dask_settings), "service": _service(name)},
            "worker": {"replicas": replicas, "spec": _worker(name, driver, size, settings)},
        },
    }


def scheduler_settings(allowed_failures: int, no_worker_seconds: float) -> dict[str, str]:
    """Return settings of the Dask scheduler, by their name under `distributed.scheduler`.

    Args:
        allowed_failures: Workers that a task may lose before Dask gives it up.
        no_worker_seconds: Seconds that tasks wait while there is no worker.
    """
    return {"allowed-failures": str(allowed_failures), "no-workers-timeout": f"{no_worker_seconds:g}s"}


def parts(
    cluster: Mapping[str, Any], size: SizeSettings, settings: KubernetesSettings, identity: Identity | None
) -> list[dict[str, Any]]:
    """Return what else belongs to a cluster that exists, in the order of their creation; the Secret first, if any."""
    found = [secret(cluster, identity)] if identity else []
    found.append(worker_group(cluster))
    if settings.adaptive_minimum:
        found.append(autoscaler(cluster, size, settings))
    return found


def worker_group(cluster: Mapping[str, Any]) -> dict[str, Any]:
    """Return the DaskWorkerGroup of a cluster that exists.

    The operator creates the same one, but later, and without an owner until it comes back to it: a cluster that is
    deleted in between leaves an orphaned group. Created here, it has its owner at once, and workers start with the
    scheduler.
    """
    metadata = cluster["metadata"]
    labels = {**metadata["labels"], names.LABEL_CLUSTER: metadata["name"], "dask.org/component": "workergroup"}
    return {
        "apiVersion": names.GROUP,
        "kind": "DaskWorkerGroup",
        "metadata": {
            "name": f"{metadata['name']}-default",
            "labels": labels,
            "annotations": _annotations(cluster),
            "ownerReferences": [_owned_by(cluster)],
        },
        "spec": {"cluster": metadata["name"], "worker": cluster["spec"]["worker"]},
    }


def secret(cluster: Mapping[str, Any], identity: Identity) -> dict[str, Any]:
    """Return the Secret with the key and certificate of a cluster that exists; its pods wait for it."""
    name = names.tls_secret(cluster["metadata"]["name"])
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": names.TLS_TYPE,
        # The kubelet need not watch it.
        "immutable": True,
        "metadata": {
            "name": name,
            "labels": cluster["metadata"]["labels"],
            "ownerReferences": [_owned_by(cluster)],
        },
        "stringData": {"tls.crt": identity.certificate, "tls.key": identity.key},
    }


def autoscaler(cluster: Mapping[str, Any], size: SizeSettings, settings: KubernetesSettings) -> dict[str, Any]:
    """Return the DaskAutoscaler of an adaptive cluster that exists: the operator asks the scheduler for its target."""
    name = cluster["metadata"]["name"]
    return {
        "apiVersion": names.GROUP,
        "kind": "DaskAutoscaler",
        "metadata": {
            "name": name,
            "labels": cluster["metadata"]["labels"],
            "annotations": _annotations(cluster),
            "ownerReferences": [_owned_by(cluster)],
        },
        "spec": {"cluster": name, "minimum": settings.adaptive_minimum, "maximum": size.workers},
    }


def _annotations(cluster: Mapping[str, Any]) -> dict[str, str]:
    """Return ours: a shared cluster that another run has made has the operator's by now, which no run may write."""
    found = cluster["metadata"]["annotations"]
    return {name: value for name, value in found.items() if name.startswith(names.OWN_ANNOTATIONS)}


def _owned_by(cluster: Mapping[str, Any]) -> dict[str, Any]:
    metadata = cluster["metadata"]
    return {"apiVersion": names.GROUP, "kind": "DaskCluster", "name": metadata["name"], "uid": metadata["uid"]}


def protocol(settings: KubernetesSettings) -> str:
    """Return the protocol of Dask's addresses."""
    return "tls" if settings.tls else "tcp"


def _scheduler(
    cluster: str, driver: Driver, settings: KubernetesSettings, dask_settings: Mapping[str, str]
) -> dict[str, Any]:
    routes = ADAPTIVE_HTTP_ROUTES if settings.adaptive_minimum else HTTP_ROUTES
    container = _container(
        "scheduler",
        driver,
        args=[
            "distributed.cli.dask_scheduler",
            f"--protocol={protocol(settings)}",
            "--host=0.0.0.0",
            f"--port={names.SCHEDULER_PORT}",
            # The HTTP server is on; the pages of the dashboard (a third of the start-up) load with the first visitor.
            f"--dashboard-address=:{names.HTTP_PORT}",
            "--no-dashboard",
            "--preload=tidepool.compute.clusters.preload.scheduler",
        ],
        env={
            f"DASK_DISTRIBUTED__SCHEDULER__{name.upper().replace('-', '_')}": value
            for name, value in {"http--routes": str(list(routes)), **dask_settings}.items()
        },
        cpu=settings.scheduler_cpu,
        memory_gib=settings.scheduler_memory_gib,
    )
    container["ports"] = [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in _PORTS.items()]
    # For people and for the operator's autoscaler; no start waits for it. No liveness probe: a scheduler that is killed
    # for being busy takes the run with it.
    container["readinessProbe"] = {
        "httpGet": {"port": "http-dashboard", "path": "/health"},
        "periodSeconds": 5,
        "timeoutSeconds": 10,
    }
    return _pod(cluster, container, driver.placement, tls=settings.tls, scratch_gib=1)


def _worker(cluster: str, driver: Driver, size: SizeSettings, settings: KubernetesSettings) -> dict[str, Any]:
    given = {each["name"] for each in driver.env}
    container = _container(
        "worker",
        driver,
        args=[
            "distributed.cli.dask_worker",
            "--name=$(DASK_WORKER_NAME)",
            f"--nthreads={size.threads}",
            f"--worker-port={names.WORKER_PORT}",
            f"--memory-limit={round(size.memory_gib * 1024)}MiB",
            # Kubernetes restarts it, and reports an out-of-memory kill; a nanny hides it and costs 0.6 s.
            "--no-nanny",
            "--no-dashboard",
            "--preload=tidepool.compute.clusters.preload.worker",
        ],
        # A worker that pauses at 80 % of its memory continues when results leave it. What its libraries hold never
        # leaves: it would pause forever without a message. Above the limit Kubernetes ends it, and the run reports out
        # of memory.
        env={
            "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "False",
            # The operator's own has another protocol, and a name for which the DNS is asked four times.
            "DASK_SCHEDULER_ADDRESS": (
                f"{protocol(settings)}://{names.scheduler_service(cluster)}:{names.SCHEDULER_PORT}"
            ),
            **{name: value for name, value in WORKER_VARIABLES.items() if name not in given},
        },
        cpu=size.cpu,
        memory_gib=size.memory_gib,
    )
    placement = dict(driver.placement)
    if settings.worker_node_selector:
        placement["nodeSelector"] = settings.worker_node_selector
        # The driver's affinity is for drivers; it may exclude just these nodes.
        placement.pop("affinity", None)
    if settings.worker_tolerations:
        placement["tolerations"] = [*placement.get("tolerations", []), *settings.worker_tolerations]
    placement.pop("priorityClassName", None)
    if settings.worker_priority_class:
        placement["priorityClassName"] = settings.worker_priority_class
    return _pod(cluster, container, placement, tls=settings.tls, scratch_gib=settings.scratch_gib)


def _container(
    name: str, driver: Driver, *, args: list[str], env: Mapping[str, str], cpu: float, memory_gib: float
) -> dict[str, Any]:
    memory = f"{round(memory_gib * 1024)}Mi"
    return {
        "name": name,
        "image": driver.image,
        "imagePullPolicy": "IfNotPresent",
        # `dask scheduler` is the same, after importing the commands of every other package.
        "args": ["python", "-m", *args],
        "env": [*driver.env, *({"name": key, "value": value} for key, value in env.items())],
        "envFrom": driver.env_from,
        # No CPU limit: a pod that starts may use what the node has free; the request is its share of a full node.
        "resources": {"requests": {"cpu": f"{round(cpu * 1000)}m", "memory": memory}, "limits": {"memory": memory}},
        "securityContext": _RESTRICTED_CONTAINER,
        # The reason of a failed start is then in the pod's status; its log may be gone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 - the pod's own, the only writable folder
    }


def _pod(
    cluster: str, container: dict[str, Any], placement: dict[str, Any], *, tls: bool, scratch_gib: float
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {"sizeLimit": f"{round(scratch_gib * 1024)}Mi"}}]
    if tls:
        container["env"] += [{"name": name, "value": value} for name, value in _TLS_VARIABLES.items()]
        container["volumeMounts"].append({"name": "tls", "mountPath": names.TLS_FOLDER, "readOnly": True})
        # For the pod's group only.
        volumes.append({"name": "tls", "secret": {"secretName": names.tls_secret(cluster), "defaultMode": 0o440}})
    return {
        **placement,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _RESTRICTED_POD,
        "terminationGracePeriodSeconds": 10,
        "containers": [container],
        "volumes": volumes,
    }


def _service(cluster: str) -> dict[str, Any]:
    return {
        "type": "ClusterIP",
        # Workers can connect as soon as the scheduler listens, not a probe and an endpoint update later.
        "publishNotReadyAddresses": True,
        "selector": {"dask.org/cluster-name": cluster, "dask.org/component": "scheduler"},
        "ports": [{"name": name, "protocol": "TCP", "port": port, "targetPort": name} for name, port in _PORTS.items()],
    }

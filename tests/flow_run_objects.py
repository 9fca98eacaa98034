"""The objects of a flow run as tidepool, Prefect's worker and the Dask operator make them, and ways to ask for more.

tests/unit/test_object_rules.py tries them with the operator's function, tests/cluster/test_admission.py with a real API
server under the policies of k8s/cluster.
"""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import kopf
from dask_kubernetes.operator.controller import controller
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from tidepool.compute.clusters.kubernetes import certificate, manifest, names
from tidepool.compute.clusters.kubernetes.driver import Driver, Run
from tidepool.settings import KubernetesSettings, SizeSettings

TOP = Path(__file__).resolve().parents[1]
REPOSITORY = "registry.example.com/tidepool"
IMAGE = f"{REPOSITORY}@sha256:{'a' * 64}"
DRIVER_POD = "blue-heron-abcde-fghij"
DRIVER_UID = "5f0c7a9e-1b2c-4d3e-8f4a-5b6c7d8e9f0a"
CLUSTER = "weekly-fore-0d9e1c1e-2-abcd-5f0c7a9e"
NODES = {"pool": "spot"}
PARAMETERS = {
    "annotations": "example.com/cost",
    "configMaps": "tidepool-flow-run",
    "images": "tidepool:dev",
    "labels": "team",
    "maxCpu": "10",
    "maxDisk": "20Gi",
    "maxMemory": "40Gi",
    "maxWorkers": "5",
    "nodeSelectors": "pool",
    "priorityClasses": "tidepool-driver,tidepool-worker",
    "pullSecrets": "registry",
    "repositories": REPOSITORY,
    "secrets": "tidepool-credentials,tidepool-auth",
    "serviceAccounts": "tidepool-flow-run",
    "tolerations": "spot",
}
_PASSWORD = {"name": "PREFECT_API_AUTH_STRING", "valueFrom": {"secretKeyRef": {"name": "tidepool-auth", "key": "k"}}}
_TOKEN = {
    "name": "kube-api-access-abcde",
    "projected": {
        "defaultMode": 420,
        "sources": [
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {
                "downwardAPI": {
                    "items": [
                        {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}
                    ]
                }
            },
        ],
    },
}

Object = dict[str, Any]


def _job() -> Object:
    """The Job of a flow run, by Prefect's own worker."""
    template = json.loads((TOP / "k8s/work-pool/base-job-template.json").read_text())
    values = {"image": IMAGE, "labels": {"team": "a"}, "node_selector": NODES}
    # Nothing in the template refers to the server, so the client is never used.
    unreachable = PrefectClient("http://127.0.0.1:1/api")
    configuration = asyncio.run(
        KubernetesWorkerJobConfiguration.from_template_and_values(template, values, client=unreachable)
    )
    configuration.prepare_for_flow_run(FlowRun(id=UUID(int=1), flow_id=UUID(int=2), name="blue-heron"))
    job: Object = configuration.job_manifest
    del job["metadata"]["namespace"]
    spec = job["spec"]["template"]["spec"]
    spec["containers"][0]["env"].append(_PASSWORD)
    # The API server drops both: they are not a pod's.
    spec.pop("parallelism", None)
    spec.pop("completions", None)
    return job


def _clusters() -> dict[str, Object]:
    """A Dask cluster by tidepool, and what the operator makes of it."""
    settings = KubernetesSettings(
        adaptive_minimum=2, pod_name=DRIVER_POD, worker_node_selector=NODES, worker_priority_class="tidepool-worker",
        worker_tolerations=[{"key": "spot", "operator": "Exists"}],
    )  # fmt: skip
    size = SizeSettings(workers=3, threads=2, cpu=0.5, memory_gib=1.5)
    references = [
        {"configMapRef": {"name": "tidepool-flow-run"}},
        {"secretRef": {"name": "tidepool-credentials", "optional": True}},
    ]
    driver = Driver(
        IMAGE, env=[_PASSWORD], env_from=references, owner=("blue-heron-abcde", "uid-j"),
        placement={"imagePullSecrets": [{"name": "registry"}], "priorityClassName": "tidepool-driver"},
    )  # fmt: skip
    cluster = manifest.manifest(
        CLUSTER,
        run=Run(str(UUID(int=1)), "weekly-forecast", 2),
        driver=driver,
        size=size,
        settings=settings,
        dask_settings={"allowed-failures": "0"},
    )
    stored = copy.deepcopy(cluster)
    stored["metadata"]["uid"] = "uid-c"
    meta = stored["metadata"]
    worker = stored["spec"]["worker"]
    deployments = {
        "scheduler": controller.build_scheduler_deployment_spec(
            CLUSTER, stored["spec"]["scheduler"]["spec"], meta["annotations"], meta["labels"]
        ),
        "worker": controller.build_worker_deployment_spec(
            f"{CLUSTER}-default", "ns", CLUSTER, "0123456789", worker["spec"], meta["annotations"], meta["labels"]
        ),
    }
    for each in deployments.values():
        kopf.adopt(each, owner=stored)  # the metadata of its pods, too: it is the same object
    service = stored["spec"]["scheduler"]["service"]
    return {
        "DaskCluster": cluster,
        "DaskWorkerGroup": manifest.worker_group(stored),
        "DaskAutoscaler": manifest.autoscaler(stored, size, settings),
        "Deployment": deployments["scheduler"],
        "Deployment of a worker": deployments["worker"],
        "Service": controller.build_scheduler_service_spec(CLUSTER, service, meta["annotations"], meta["labels"]),
        "Pod": _pod(deployments["worker"]["spec"]["template"], "a"),
        "Secret": manifest.secret(stored, certificate.own()),
    }


def _pod(template: Object, name: str, *volumes: Object) -> Object:
    """A pod as its controller makes it, with what admission adds."""
    pod = copy.deepcopy({"apiVersion": "v1", "kind": "Pod", **template})
    pod["metadata"]["name"] = name
    pod["spec"]["volumes"] += volumes
    return pod


def _legitimate() -> dict[str, Object]:
    job = _job()
    found = {"Job": job, "Driver": _pod(job["spec"]["template"], "d", _TOKEN), **_clusters()}
    return copy.deepcopy(found)  # parts of them are the same objects


LEGITIMATE = _legitimate()
# Where the pods of an object are.
PODS = {
    "DaskCluster": ("spec.scheduler.spec", "spec.worker.spec"),
    "DaskWorkerGroup": ("spec.worker.spec",),
    "Job": ("spec.template.spec",),
    "Deployment": ("spec.template.spec",),
    "Driver": ("spec",),
    "Pod": ("spec",),
}

_SECRET_REF = {"name": "tidepool-database", "key": "connection-url"}
_ITEM = {"name": "v"}
_VOLUMES = {
    "a Secret": {"secret": {"secretName": "tidepool-database"}},
    "another cluster's key": {"secret": {"secretName": "other-0d9e1c1e-1-ffff-dask-tls"}},
    "a folder of the node": {"hostPath": {"path": "/"}},
    "a ConfigMap": {"configMap": {"name": "tidepool-flow-run-rules"}},
    "a claim": {"persistentVolumeClaim": {"claimName": "c"}},
    "a token for others": {"projected": {"sources": [{"serviceAccountToken": {"path": "token", "audience": "vault"}}]}},
    "a projected Secret": {"projected": {"sources": [{"secret": {"name": "tidepool-database"}}]}},
    "a trust bundle": {"projected": {"sources": [{"clusterTrustBundle": {"name": "b", "path": "ca"}}]}},
    "fields of the node": {
        "downwardAPI": {"items": [{"path": "a", "fieldRef": {"fieldPath": "metadata.annotations"}}]}
    },
    "NFS": {"nfs": {"server": "10.0.0.1", "path": "/"}},
    "CSI": {"csi": {"driver": "secrets-store.csi.k8s.io"}},
    "iSCSI": {"iscsi": {"targetPortal": "10.0.0.1", "iqn": "iqn.2001-04.com.example:x", "lun": 0}},
    "memory": {"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    "an endless folder": {"emptyDir": {}},
    "a huge folder": {"emptyDir": {"sizeLimit": "1Ti"}},
    "an ephemeral claim": {
        "ephemeral": {
            "volumeClaimTemplate": {
                "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Ti"}}}
            }
        }
    },
}
_MEGABYTE = "a" * 1_000_000
_PROBE = {"exec": {"command": ["true"]}}
# What a pod may not have: (title, path in the pod's spec, value); None removes, an item is appended to a list with `+`.
POD: tuple[tuple[str, str, Any], ...] = (
    ("host network", "hostNetwork", True),
    ("host processes", "hostPID", True),
    ("host IPC", "hostIPC", True),
    ("shared processes", "shareProcessNamespace", True),
    ("a node", "nodeName", "node"),
    ("another account", "serviceAccountName", "tidepool-operator"),
    ("another account by its old name", "serviceAccount", "tidepool-operator"),
    ("another runtime", "runtimeClassName", "none"),
    ("a system priority", "priorityClassName", "system-node-critical"),
    ("another scheduler", "schedulerName", "mine"),
    ("the node's DNS", "dnsPolicy", "Default"),
    ("a DNS server", "dnsConfig", {"nameservers": ["10.0.0.1"]}),
    ("host names", "hostAliases", [{"ip": "10.0.0.1", "hostnames": ["tidepool-server"]}]),
    ("a host name", "hostname", "tidepool-server"),
    ("a subdomain", "subdomain", "tidepool"),
    ("every taint", "tolerations", [{"operator": "Exists"}]),
    ("the control plane", "tolerations", [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}]),
    ("one node", "nodeSelector", {"kubernetes.io/hostname": "n"}),
    ("neighbours", "affinity", {"podAffinity": {}}),
    ("a spread", "topologySpreadConstraints",
     [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]),
    ("another pull secret", "imagePullSecrets", [{"name": "tidepool-database"}]),
    ("an init container", "initContainers", [{"name": "i", "image": IMAGE}]),
    ("a second container", "containers+", {"name": "two", "image": IMAGE}),
    ("an ephemeral container", "ephemeralContainers", [{"name": "e", "image": IMAGE}]),
    ("a claim of a device", "resourceClaims", [{"name": "c", "resourceClaimName": "r"}]),
    ("other users", "hostUsers", False),
    ("overhead", "overhead", {"cpu": "1"}),
    ("readiness gates", "readinessGates", [{"conditionType": "a"}]),
    ("a grace of an hour", "terminationGracePeriodSeconds", 3600),
    ("a megabyte of command", "containers.0.args", [_MEGABYTE]),
    ("a command of many words", "containers.0.command", ["a"] * 101),
    ("a megabyte of working directory", "containers.0.workingDir", _MEGABYTE),
    ("a megabyte of variables", "containers.0.env", [{"name": f"A{n}", "value": "a" * 8192} for n in range(128)]),
    ("a megabyte of a variable's name", "containers.0.env+", {"name": _MEGABYTE, "value": "a"}),
    ("many ports", "containers.0.ports", [{"name": f"p{n}", "containerPort": 1000 + n} for n in range(100)]),
    ("many mounts", "containers.0.volumeMounts", [{"name": "tmp", "mountPath": f"/tmp/{n}"} for n in range(100)]),
    ("a megabyte of node selector", "nodeSelector", {"pool": _MEGABYTE}),
    ("a megabyte of toleration", "tolerations", [{"key": "spot", "value": _MEGABYTE}]),
    ("root", "securityContext.runAsUser", 0),
    ("maybe root", "securityContext.runAsNonRoot", False),
    ("the root group", "securityContext.runAsGroup", 0),
    ("further groups", "securityContext.supplementalGroups", [0]),
    ("sysctls", "securityContext.sysctls", [{"name": "net.ipv4.ip_forward", "value": "1"}]),
    ("SELinux", "securityContext.seLinuxOptions", {"type": "spc_t"}),
    ("no seccomp", "securityContext.seccompProfile.type", "Unconfined"),
    ("no security context", "securityContext", None),
    *((f"a volume: {title}", "volumes+", _ITEM | volume) for title, volume in _VOLUMES.items()),
    ("a privileged container", "containers.0.securityContext.privileged", True),
    ("capabilities", "containers.0.securityContext.capabilities.add", ["NET_BIND_SERVICE"]),
    ("kept capabilities", "containers.0.securityContext.capabilities", {"drop": ["NET_RAW"]}),
    ("escalation", "containers.0.securityContext.allowPrivilegeEscalation", True),
    ("a writable root", "containers.0.securityContext.readOnlyRootFilesystem", False),
    ("a container as root", "containers.0.securityContext.runAsUser", 0),
    ("/proc", "containers.0.securityContext.procMount", "Unmasked"),
    ("a container without a context", "containers.0.securityContext", None),
    ("another image", "containers.0.image", f"docker.io/library/alpine@sha256:{'b' * 64}"),
    ("a longer repository", "containers.0.image", f"{REPOSITORY}-two@sha256:{'b' * 64}"),
    ("a tag", "containers.0.image", f"{REPOSITORY}:latest"),
    ("a Secret's key", "containers.0.env+", {"name": "A", "valueFrom": {"secretKeyRef": _SECRET_REF}}),
    ("a Secret without a name", "containers.0.env+", {"name": "A", "valueFrom": {"secretKeyRef": {"key": "a"}}}),
    ("a ConfigMap's key", "containers.0.env+",
     {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "tidepool-work-pool", "key": "a"}}}),
    ("the node's name", "containers.0.env+", {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}),
    ("the node's address", "containers.0.env+",
     {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}),
    ("resource fields", "containers.0.env+",
     {"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}),
    ("a whole Secret", "containers.0.envFrom+", {"secretRef": {"name": "tidepool-database"}}),
    ("a whole ConfigMap", "containers.0.envFrom+", {"configMapRef": {"name": "tidepool-work-pool"}}),
    ("a hook", "containers.0.lifecycle", {"postStart": {"exec": {"command": ["true"]}}}),
    ("a liveness probe", "containers.0.livenessProbe", _PROBE),
    ("a startup probe", "containers.0.startupProbe", _PROBE),
    ("a probe that executes", "containers.0.readinessProbe", _PROBE),
    ("a probe of another host", "containers.0.readinessProbe",
     {"httpGet": {"host": "169.254.169.254", "path": "/", "port": 80}}),
    ("a probe with headers", "containers.0.readinessProbe",
     {"httpGet": {"path": "/", "port": 80, "httpHeaders": [{"name": "Host", "value": "a"}]}}),
    ("a port of the node", "containers.0.ports", [{"containerPort": 80, "hostPort": 80}]),
    ("a GPU", "containers.0.resources.limits", {"memory": "1Gi", "nvidia.com/gpu": "1"}),
    ("no limit", "containers.0.resources.limits", None),
    ("no request", "containers.0.resources.requests", None),
    ("too much memory", "containers.0.resources.limits.memory", "41Gi"),
    ("too many cores", "containers.0.resources.requests.cpu", "10001m"),
    ("an exotic amount", "containers.0.resources.requests.cpu", "1e-2"),
    ("a device", "containers.0.volumeDevices", [{"name": "tmp", "devicePath": "/dev/a"}]),
    ("mounts that spread", "containers.0.volumeMounts",
     [{"name": "tmp", "mountPath": "/tmp", "mountPropagation": "HostToContainer"}]),
    ("a part of a volume", "containers.0.volumeMounts", [{"name": "tmp", "mountPath": "/tmp", "subPath": "a"}]),
    ("a terminal", "containers.0.tty", True),
    ("another message", "containers.0.terminationMessagePath", "/etc/passwd"),
)  # fmt: skip
_TEAM = {"team": "a"}
_LABEL = "app.kubernetes.io/component"
# The same for whole objects.
OBJECTS: tuple[tuple[str, str, str, Any], ...] = (
    ("DaskCluster", "a name that no Service may have", "metadata.name", f"1{CLUSTER}"),
    ("DaskCluster", "a name with dots", "metadata.name", f"a.{CLUSTER}"),
    ("DaskCluster", "a long name", "metadata.name", "a" * 54),
    ("DaskCluster", "a driver's label", f"metadata.labels|{_LABEL}", "flow-run"),
    ("DaskCluster", "the server's labels", "metadata.labels|app.kubernetes.io/name", "tidepool"),
    ("DaskCluster", "a label of ours", "metadata.labels|app", "postgres"),
    ("DaskCluster", "a label of the scheduler", "spec.scheduler.metadata", {"labels": {"app": "s3"}}),
    ("DaskCluster", "a label of the workers", "spec.worker.metadata", {"labels": {_LABEL: "flow-run"}}),
    ("DaskCluster", "an annotation", "metadata.annotations|vault.hashicorp.com/agent-inject", "true"),
    ("DaskCluster", "an annotation of the workers", "spec.worker.metadata",
     {"annotations": {"k8s.v1.cni.cncf.io/networks": "host"}}),
    ("DaskCluster", "a megabyte of an annotation", f"metadata.annotations|{names.ANNOTATION_VERSIONS}", "a" * 200_000),
    ("DaskCluster", "many annotations", "metadata.annotations", {f"tidepool.dev/a{n}": "a" for n in range(100)}),
    ("DaskCluster", "a megabyte of an annotation of the workers", "spec.worker.metadata",
     {"annotations": {"tidepool.dev/a": _MEGABYTE}}),
    ("DaskCluster", "a megabyte of a label of the workers", "spec.worker.metadata",
     {"labels": {"tidepool.dev/a": _MEGABYTE}}),
    ("DaskCluster", "a megabyte of metadata of the workers", "spec.worker.metadata", {"name": _MEGABYTE}),
    ("DaskCluster", "many ports of the Service", "spec.scheduler.service.ports",
     [{"name": f"p{n}", "port": 1000 + n} for n in range(100)]),
    ("Secret", "a megabyte of a key", "stringData|tls.key", "a" * 900_000),
    ("Secret", "another key", "data|another", "YQ=="),
    ("DaskCluster", "a finalizer", "metadata.finalizers", ["example.com/stay"]),
    ("DaskCluster", "a finalizer of Jobs", "metadata.finalizers", ["batch.kubernetes.io/job-tracking"]),
    ("DaskCluster", "a finalizer that keeps its pods", "metadata.finalizers", ["orphan"]),
    ("DaskCluster", "a Job that must wait for it", "metadata.ownerReferences.0.blockOwnerDeletion", True),
    ("DaskCluster", "two owners", "metadata.ownerReferences+",
     {"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "u"}),
    ("Secret", "two owners", "metadata.ownerReferences+",
     {"apiVersion": names.GROUP, "kind": "DaskCluster", "name": CLUSTER, "uid": "u"}),
    ("DaskCluster", "another owner", "metadata.ownerReferences",
     [{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u"}]),
    ("DaskCluster", "too many workers", "spec.worker.replicas", 6),
    ("DaskCluster", "too much in all", "spec.worker.spec.containers.0.resources.requests.cpu", "10"),
    ("DaskCluster", "too much memory in all", "spec.worker.spec.containers.0.resources.limits.memory", "30Gi"),
    ("DaskCluster", "any number of workers", "spec.worker.replicas", None),
    ("DaskCluster", "no idle timeout", "spec.idleTimeout", None),
    ("DaskCluster", "an idle timeout of never", "spec.idleTimeout", 0),
    ("DaskCluster", "a token of the scheduler", "spec.scheduler.spec.automountServiceAccountToken", True),
    ("DaskCluster", "a token by default", "spec.worker.spec.automountServiceAccountToken", None),
    ("DaskCluster", "a load balancer", "spec.scheduler.service.type", "LoadBalancer"),
    ("DaskCluster", "a port of the nodes", "spec.scheduler.service.ports",
     [{"name": "a", "port": 80, "nodePort": 30080}]),
    ("DaskCluster", "another name", "spec.scheduler.service.externalName", "example.com"),
    ("DaskCluster", "addresses", "spec.scheduler.service.externalIPs", ["10.0.0.1"]),
    ("DaskCluster", "an address", "spec.scheduler.service.clusterIP", "10.96.0.10"),
    ("DaskCluster", "another cluster's pods", "spec.scheduler.service.selector",
     {"dask.org/cluster-name": "other", "dask.org/component": "scheduler"}),
    ("DaskCluster", "all pods", "spec.scheduler.service.selector", None),
    ("DaskWorkerGroup", "another cluster", "spec.cluster", "other"),
    ("DaskWorkerGroup", "another name", "metadata.name", "mine"),
    ("DaskWorkerGroup", "no owner", "metadata.ownerReferences", None),
    ("DaskWorkerGroup", "another owner", "metadata.ownerReferences",
     [{"apiVersion": names.GROUP, "kind": "DaskCluster", "name": "other", "uid": "u"}]),
    ("DaskWorkerGroup", "a Job as owner", "metadata.ownerReferences",
     [{"apiVersion": "batch/v1", "kind": "Job", "name": CLUSTER, "uid": "u"}]),
    ("DaskWorkerGroup", "too many workers", "spec.worker.replicas", 6),
    ("DaskWorkerGroup", "another component", "metadata.labels|dask.org/component", "scheduler"),
    ("DaskAutoscaler", "too many workers", "spec.maximum", 6),
    ("DaskAutoscaler", "another cluster", "spec.cluster", "other"),
    ("DaskAutoscaler", "no owner", "metadata.ownerReferences", None),
    ("Job", "another component", f"spec.template.metadata.labels|{_LABEL}", "server"),
    ("Job", "no component", "spec.template.metadata.labels", {}),
    ("Job", "a Dask label", "spec.template.metadata.labels|dask.org/component", "scheduler"),
    ("Job", "an unknown label", "spec.template.metadata.labels|app", "s3"),
    ("Job", "an annotation", "spec.template.metadata.annotations", {"iam.amazonaws.com/role": "admin"}),
    ("Job", "many pods", "spec.parallelism", 10),
    ("Job", "other pods", "spec.manualSelector", True),
    ("Job", "a second time", "spec.backoffLimit", 6),
    ("Job", "no end", "spec.activeDeadlineSeconds", None),
    ("Job", "no deletion", "spec.ttlSecondsAfterFinished", None),
    ("Job", "no account", "spec.template.spec.serviceAccountName", None),
    ("Job", "a volume with a token", "spec.template.spec.volumes+", _TOKEN),
    ("Job", "a Dask key", "spec.template.spec.volumes+",
     _ITEM | {"secret": {"secretName": names.tls_secret(CLUSTER)}}),
    ("Deployment", "a token", "spec.template.spec.automountServiceAccountToken", True),
    ("Deployment", "a volume with a token", "spec.template.spec.volumes+", _TOKEN),
    ("Deployment", "many pods", "spec.replicas", 10),
    ("Pod", "a token", "spec.automountServiceAccountToken", True),
    ("Pod", "a volume with a token", "spec.volumes+", _TOKEN),
    ("Pod", "no Dask label", "metadata.labels", _TEAM),
    ("Driver", "a Dask label", "metadata.labels|dask.org/component", "worker"),
    ("Service", "a load balancer", "spec.type", "LoadBalancer"),
    ("Service", "addresses", "spec.externalIPs", ["10.0.0.1"]),
    ("Service", "another cluster's pods", "spec.selector",
     {"dask.org/cluster-name": "other", "dask.org/component": "scheduler"}),
    ("Service", "drivers", "spec.selector", {_LABEL: "flow-run"}),
    ("Secret", "a token", "type", "kubernetes.io/service-account-token"),
    ("Secret", "the account of a token", "metadata.annotations",
     {"kubernetes.io/service-account.name": "tidepool-flow-run"}),
    ("Secret", "a label", "metadata.labels", {"argocd.argoproj.io/secret-type": "repository"}),
    ("Secret", "no owner", "metadata.ownerReferences", None),
    ("Secret", "another name", "metadata.name", "tidepool-credentials"),
    ("Secret", "another owner", "metadata.ownerReferences",
     [{"apiVersion": "batch/v1", "kind": "Job", "name": CLUSTER, "uid": "u"}]),
)  # fmt: skip


def attempts() -> dict[str, tuple[str, Object]]:
    """Return every attempt: title -> the key of the rule, and the object."""
    found = {
        f"{kind}: {title}": (kind.partition(" ")[0], _changed(LEGITIMATE[kind], path, value))
        for kind, title, path, value in OBJECTS
    }
    for kind, places in PODS.items():
        for place in places:
            for title, path, value in POD:
                changed = _changed(LEGITIMATE[kind], f"{place}.{path}", value)
                found[f"{kind}, {place}: {title}"] = (kind, changed)
    return found


def _changed(original: Object, path: str, value: Any) -> Object:
    """Return an object with another value at a path; a key with dots stands behind `|`."""
    changed = copy.deepcopy(original)
    path, _, last = path.partition("|")
    steps = [*path.removesuffix("+").split("."), *([last] if last else [])]
    inner: Any = changed
    for step in steps[:-1]:
        inner = inner[int(step)] if step.isdecimal() else inner.setdefault(step, {})
    if path.endswith("+"):
        inner.setdefault(steps[-1], []).append(value)
    elif value is None:
        del inner[steps[-1]]
    else:
        inner[steps[-1]] = value
    return changed

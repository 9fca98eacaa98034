"""Rules for the objects of flow runs, as data: Jobs, Dask clusters, their pods and Secrets, and nothing else.

The operator checks with `violations`; k8s/generate.py writes the same rules as ValidatingAdmissionPolicies. What
differs from installation to installation, the parameters, is in a ConfigMap of the runs' namespace, which both read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidepool.compute.clusters.kubernetes.names import OURS, OWN_ANNOTATIONS, TLS_TYPE, tls_secret
from tidepool.operate.pod_rules import DASK_POD, DASK_TEMPLATE, DRIVER_POD, DRIVER_TEMPLATE
from tidepool.operate.rules import (
    CLUSTER,
    NO,
    Anything,
    Between,
    Fields,
    Items,
    Matching,
    Named,
    Rule,
    Scalar,
    Total,
    broken,
    one_of,
    quantity,
    scalars,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

# The parameters: keys of the ConfigMap. A list is comma-separated.
LISTS = (
    "annotations", "configMaps", "images", "labels", "nodeSelectors", "priorityClasses", "pullSecrets", "repositories",
    "secrets", "serviceAccounts", "tolerations",
)  # fmt: skip
AMOUNTS = ("maxCpu", "maxMemory", "maxDisk")
NUMBERS = ("maxWorkers",)

COMPONENT = "app.kubernetes.io/component"
DRIVER = "Driver"  # a Pod that the base job template makes

# --- metadata: NetworkPolicies select pods by labels, and agents on the nodes act on annotations ---------------------

# Copies of the object, by kopf and kubectl.
COPIES = ("kopf.zalando.org/last-handled-configuration", "kubectl.kubernetes.io/last-applied-configuration")
_ANNOTATIONS = Fields(
    dict.fromkeys(COPIES, Scalar(262144)),
    others=Scalar(4096),
    parameter="annotations",
    prefixes=(
        OWN_ANNOTATIONS, "batch.kubernetes.io/", "deployment.kubernetes.io/",
        "kopf.zalando.org/", "kubectl.kubernetes.io/",
        "kubernetes.dask.org/", "kubernetes.io/limit-ranger", "prefect.io/",
    ),
)  # fmt: skip
_OF_TIDEPOOL: dict[str, Rule] = {name: one_of(value) for name, value in OURS.items()}


def _labels(*needed: str, **known: Rule) -> Fields:
    return Fields({**_OF_TIDEPOOL, **known}, needed=needed, prefixes=(OWN_ANNOTATIONS,), parameter="labels")


def _job_labels(*needed: str) -> Fields:
    known = {
        **scalars("app.kubernetes.io/name", "app.kubernetes.io/version", "controller-uid", "job-name"),
        "app.kubernetes.io/managed-by": one_of("prefect"),
        "app.kubernetes.io/part-of": one_of("prefect"),
        COMPONENT: one_of("flow-run"),
    }
    return Fields(
        known, needed=needed, prefixes=(OWN_ANNOTATIONS, "prefect.io/", "batch.kubernetes.io/"), parameter="labels"
    )


_GROUP_LABELS = _labels(**{"dask.org/cluster-name": Named("{}"), "dask.org/component": one_of("workergroup")})
# Of what the operator makes for a cluster.
_DASK_LABELS = _labels(
    "dask.org/cluster-name",
    "dask.org/component",
    **scalars("dask.org/workergroup-name", "pod-template-hash"),
    **{
        "dask.org/cluster-name": Named("{}"),
        "dask.org/component": one_of("scheduler", "worker"),
        "sidecar.istio.io/inject": one_of("false"),
    },
)
# Another finalizer would keep a deleted cluster, and so its pods: kopf takes its own away, the API server the other.
_FINALIZERS = Items(one_of("foregroundDeletion", "kopf.zalando.org/KopfFinalizerMarker"))
# Of Jobs and pods the Job controller takes this one away.
_JOB_FINALIZERS = Items(one_of("batch.kubernetes.io/job-tracking", "foregroundDeletion", "orphan"))


def _metadata(labels: Fields, *needed: str, **others: Rule) -> Fields:
    known = {"labels": labels, "annotations": _ANNOTATIONS, "finalizers": _FINALIZERS}
    return Fields({**known, **others}, needed=needed, open=True)


def _template(labels: Fields) -> Fields:
    known = {
        **scalars("creationTimestamp", "name", "namespace"),
        "labels": labels,
        "annotations": _ANNOTATIONS,
        # The operator gives them to a Deployment and its template alike; no pod gets a template's.
        "ownerReferences": Items(
            Fields(scalars("apiVersion", "blockOwnerDeletion", "controller", "kind", "name", "uid")), high=2
        ),
    }
    return Fields(known, needed=("labels",))


def _owner(kind: str, name: Rule, low: int, high: int = 1, **others: Rule) -> Items:
    known: dict[str, Rule] = {**scalars("apiVersion", "blockOwnerDeletion", "controller", "uid"), **others}
    return Items(Fields(known | {"kind": one_of(kind), "name": name}, needed=("kind", "name")), low=low, high=high)


# Twice, if the operator adopts what the driver has made.
_OF_ITS_CLUSTER = _owner("DaskCluster", Named("{}"), 1, 2)
# A Job whose deletion waits for the cluster could be another run's.
_OF_A_JOB = _owner("Job", Scalar(), 0, blockOwnerDeletion=NO)
# Of a Service's, which begins with a letter and has 63 characters at most, `-scheduler` among them.
_CLUSTER_NAME = Matching("[a-z]([-a-z0-9]{0,51}[a-z0-9])?")
# --- objects ----------------------------------------------------------------------------------------------------------

_SERVICE: dict[str, Rule] = {
    **scalars("publishNotReadyAddresses"),
    "type": one_of("ClusterIP"),
    "selector": Fields(
        {"dask.org/cluster-name": Named("{}"), "dask.org/component": one_of("scheduler")},
        needed=("dask.org/cluster-name", "dask.org/component"),
    ),
    "ports": Items(Fields(scalars("name", "protocol", "port", "targetPort")), low=1),
}
# Of pods, in an object whose schema lets everything through.
_BELOW = Fields({"labels": _labels(), "annotations": _ANNOTATIONS})
_WORKERS = Fields(
    {
        "metadata": _BELOW,
        "replicas": Between(0, "maxWorkers"),
        "spec": DASK_TEMPLATE,
    },
    needed=("replicas", "spec"),
    totals=(Total("requests", "cpu", "maxCpu"), Total("limits", "memory", "maxMemory")),
)


def _shell(metadata: Fields, *needed: str, **parts: Rule) -> Fields:
    # The API server takes a status from controllers only.
    known = {**scalars("apiVersion", "kind"), "status": Anything(), "metadata": metadata, **parts}
    return Fields(known, needed=("metadata", *needed))


def _kind(metadata: Fields, spec: Mapping[str, Rule], *needed: str) -> Fields:
    return _shell(metadata, "spec", spec=Fields(spec, needed))


_KEY = Scalar(16384)
RULES: dict[str, Fields] = {
    "DaskCluster": _kind(
        _metadata(_labels(), name=_CLUSTER_NAME, ownerReferences=_OF_A_JOB),
        {
            "idleTimeout": Between(60, 86400),
            "scheduler": Fields(
                {"metadata": _BELOW, "spec": DASK_TEMPLATE, "service": Fields(_SERVICE, ("selector",))},
                needed=("spec", "service"),
            ),
            "worker": _WORKERS,
        },
        "idleTimeout", "scheduler", "worker",
    ),
    "DaskWorkerGroup": _kind(
        _metadata(_GROUP_LABELS, "ownerReferences", name=Named("{}-default"), ownerReferences=_OF_ITS_CLUSTER),
        {**scalars("cluster"), "worker": _WORKERS},
        "cluster", "worker",
    ),
    "DaskAutoscaler": _kind(
        _metadata(_labels(), "ownerReferences", name=Named("{}"), ownerReferences=_OF_ITS_CLUSTER),
        {**scalars("cluster"), "minimum": Between(0, "maxWorkers"), "maximum": Between(1, "maxWorkers")},
        "cluster", "minimum", "maximum",
    ),
    # tidepool makes none, and their pods are not a cluster's.
    "DaskJob": Fields({}),
    "Job": _kind(
        _metadata(_job_labels(), finalizers=_JOB_FINALIZERS),
        {
            **scalars("podReplacementPolicy"),
            "selector": Fields({"matchLabels": _job_labels()}),
            "activeDeadlineSeconds": Between(1, 604800),
            "backoffLimit": one_of(0),
            "completionMode": one_of("NonIndexed"),
            "completions": one_of(1),
            "manualSelector": NO,
            "parallelism": one_of(1),
            "suspend": NO,
            "ttlSecondsAfterFinished": Between(0, 604800),
            "template": Fields(
                {"metadata": _template(_job_labels(COMPONENT)), "spec": DRIVER_TEMPLATE},
                needed=("metadata", "spec"),
            ),
        },
        "activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished", "template",
    ),
    "Deployment": _kind(
        _metadata(_DASK_LABELS, "labels"),
        {
            **scalars("progressDeadlineSeconds", "revisionHistoryLimit"),
            "strategy": Fields(
                {**scalars("type"), "rollingUpdate": Fields(scalars("maxSurge", "maxUnavailable"))}
            ),
            "replicas": Between(0, 1),
            "selector": Fields({"matchLabels": _DASK_LABELS}, needed=("matchLabels",)),
            "template": Fields(
                {"metadata": _template(_DASK_LABELS), "spec": DASK_TEMPLATE}, needed=("metadata", "spec")
            ),
        },
        "selector", "template",
    ),
    "Service": _kind(
        _metadata(_DASK_LABELS, "labels"),
        {
            **_SERVICE,
            **scalars("clusterIP", "internalTrafficPolicy", "ipFamilyPolicy"),
            **dict.fromkeys(("clusterIPs", "ipFamilies"), Items(Scalar())),
            "sessionAffinity": one_of("None"),
        },
        "selector",
    ),
    DRIVER: _shell(
        _metadata(_job_labels(COMPONENT), "labels", finalizers=_JOB_FINALIZERS), "spec", spec=DRIVER_POD
    ),
    "Pod": _shell(_metadata(_DASK_LABELS, "labels"), "spec", spec=DASK_POD),
    # Of accounts in the runs' namespace: the key of a Dask cluster, and no token of an account.
    "Secret": _shell(
        _metadata(
            _labels(), "ownerReferences", name=Named(tls_secret("{}")),
            ownerReferences=_owner("DaskCluster", Scalar(), 1),
        ),
        "type",
        **scalars("immutable"),
        # Bytes in base64, which the API server makes of the texts.
        **dict.fromkeys(("data", "stringData"), Fields({"tls.crt": _KEY, "tls.key": _KEY})),
        type=one_of(TLS_TYPE),
    ),
}  # fmt: skip

# Where an object has the name of its Dask cluster.
CLUSTER_NAMES: dict[str, tuple[str | int, ...]] = {
    "DaskCluster": ("metadata", "name"),
    "DaskWorkerGroup": ("spec", "cluster"),
    "DaskAutoscaler": ("spec", "cluster"),
    "Secret": ("metadata", "ownerReferences", 0, "name"),
    **dict.fromkeys(("Deployment", "Service", "Pod"), ("metadata", "labels", "dask.org/cluster-name")),
}


def violations(manifest: Mapping[str, Any], parameters: Mapping[str, str]) -> list[str]:
    """Return what an object has or asks for that it may not, in sentences; empty when it is as it may be.

    Args:
        manifest: An object of a kind in `RULES`, as JSON has it.
        parameters: The data of the ConfigMap.
    """
    if missing := [each for each in LISTS if each not in parameters]:
        return [f"the ConfigMap with the rules lacks {', '.join(missing)}"]
    for name in (*AMOUNTS, *NUMBERS):
        value = parameters.get(name, "")
        if quantity(value) is None or (name in NUMBERS and not value.isdecimal()):
            return [f"the ConfigMap with the rules needs a number for {name}, not {value!r}"]
    kind = rule_of(manifest)
    if not RULES[kind].known:
        return [f"a {kind} is not allowed"]
    return list(broken(RULES[kind], manifest, "", {**parameters, CLUSTER: _cluster_of(manifest, kind)}))


def rule_of(manifest: Mapping[str, Any]) -> str:
    """Return the key in `RULES` for an object."""
    kind = str(manifest["kind"])
    labels = manifest.get("metadata", {}).get("labels") or {}
    return DRIVER if kind == "Pod" and labels.get(COMPONENT) == "flow-run" else kind


def _cluster_of(manifest: Mapping[str, Any], kind: str) -> str:
    found: Any = manifest
    try:
        for key in CLUSTER_NAMES.get(kind, ()):
            found = found[key]
    except (KeyError, IndexError, TypeError):
        return ""
    return found if isinstance(found, str) else ""

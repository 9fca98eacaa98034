"""Rules for the pods of flow runs, as data: the fields that a driver's or a Dask pod may have, and no others.

They are allow-lists: a field that is not listed is refused, also one that a later Kubernetes adds. `object_rules` has
the objects that these pods are in.
"""

from __future__ import annotations

from tidepool.compute.clusters.kubernetes.names import tls_secret
from tidepool.operate.rules import (
    NO,
    YES,
    Between,
    Fields,
    Image,
    Items,
    Listed,
    Matching,
    Named,
    Quantity,
    Rule,
    Scalar,
    Texts,
    one_of,
    scalars,
)

_USER = 10001
# Characters. Dask pods have the variables of their driver; a driver's command may be a script (`python -c`).
_VARIABLES = 16384
_DASK_COMMAND, _DRIVER_COMMAND = Texts(4096), Texts(65536)
# Seconds between SIGTERM and SIGKILL. What a run leaves behind counts in the namespace's quota for as long.
_DASK_GRACE, _DRIVER_GRACE = Between(0, 120), Between(0, 600)
_SECRET, _CONFIG_MAP = Listed("secrets"), Listed("configMaps")
# Never a field of the node or of another container.
_OWN_FIELD = Matching(r"metadata\.[a-z]+(\['[A-Za-z0-9./_-]+'\])?|status\.podIP")
_REFERENCE = scalars("key", "optional")
_ENV = Items(
    Fields(
        {
            **scalars("name"),
            "value": Scalar(_VARIABLES),
            "valueFrom": Fields(
                {
                    "fieldRef": Fields({**scalars("apiVersion"), "fieldPath": _OWN_FIELD}),
                    "secretKeyRef": Fields({**_REFERENCE, "name": _SECRET}, needed=("name",)),
                    "configMapKeyRef": Fields({**_REFERENCE, "name": _CONFIG_MAP}, needed=("name",)),
                }
            ),
        }
    ),
    high=200,
    field="value",
    most=_VARIABLES,
)
_ENV_FROM = Items(
    Fields(
        {
            **scalars("prefix"),
            "secretRef": Fields({**scalars("optional"), "name": _SECRET}, needed=("name",)),
            "configMapRef": Fields({**scalars("optional"), "name": _CONFIG_MAP}, needed=("name",)),
        }
    )
)
_AMOUNTS: dict[str, Rule] = {
    "cpu": Quantity("maxCpu"),
    "memory": Quantity("maxMemory"),
    "ephemeral-storage": Quantity("maxDisk"),
}
_CONTAINER: dict[str, Rule] = {
    **scalars("name", "workingDir", "imagePullPolicy"),
    "resizePolicy": Items(Fields(scalars("resourceName", "restartPolicy"))),
    "image": Image(),
    "env": _ENV,
    "envFrom": _ENV_FROM,
    "ports": Items(Fields(scalars("name", "containerPort", "protocol"))),
    # Neither a command nor another host: the kubelet would call it from the node.
    "readinessProbe": Fields(
        {
            **scalars("failureThreshold", "initialDelaySeconds", "periodSeconds"),
            **scalars("successThreshold", "timeoutSeconds"),
            "httpGet": Fields(scalars("path", "port", "scheme")),
        }
    ),
    "resources": Fields(
        {"requests": Fields(_AMOUNTS, needed=("cpu",)), "limits": Fields(_AMOUNTS, needed=("memory",))},
        needed=("requests", "limits"),
    ),
    "securityContext": Fields(
        {
            "allowPrivilegeEscalation": NO,
            "readOnlyRootFilesystem": YES,
            "capabilities": Fields({"drop": Items(one_of("ALL"), low=1)}, needed=("drop",)),
        },
        needed=("allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"),
    ),
    "terminationMessagePath": one_of("/dev/termination-log"),
    "terminationMessagePolicy": Scalar(),
    "volumeMounts": Items(Fields(scalars("name", "mountPath", "readOnly"))),
}


def _one_container(command: Rule) -> Items:
    known = {**_CONTAINER, "command": command, "args": command}
    return Items(Fields(known, needed=("image", "resources", "securityContext")), low=1, high=1)


_EMPTY_DIR = Fields({"sizeLimit": Quantity("maxDisk")}, needed=("sizeLimit",))
_KEYS = Items(Fields(scalars("key", "mode", "path")))
_TLS = Fields({**scalars("defaultMode", "optional"), "items": _KEYS, "secretName": Named(tls_secret("{}"))},
              needed=("secretName",))  # fmt: skip
# The token of the pod's own account for the Kubernetes API, as Kubernetes mounts it: no other audience.
_TOKEN = Fields(
    {
        **scalars("defaultMode"),
        "sources": Items(
            Fields(
                {
                    "serviceAccountToken": Fields({**scalars("expirationSeconds"), "path": one_of("token")}),
                    "configMap": Fields({"items": _KEYS, "name": one_of("kube-root-ca.crt")}),
                    "downwardAPI": Fields(
                        {
                            "items": Items(
                                Fields(
                                    {
                                        **scalars("path"),
                                        "fieldRef": Fields(
                                            {**scalars("apiVersion"), "fieldPath": one_of("metadata.namespace")}
                                        ),
                                    }
                                )
                            )
                        }
                    ),
                }
            )
        ),
    }
)
_TOLERATIONS = Items(
    Fields(
        {
            **scalars("operator", "value", "effect", "tolerationSeconds"),
            "key": Listed(
                "tolerations",
                also=tuple(
                    f"node.kubernetes.io/{each}"
                    for each in ("not-ready", "unreachable", "memory-pressure")  # which Kubernetes adds
                ),
            ),
        },
        needed=("key",),  # without a key: of every taint
    )
)
_POD: dict[str, Rule] = {
    **scalars("enableServiceLinks", "restartPolicy"),
    "dnsPolicy": one_of("ClusterFirst"),
    "imagePullSecrets": Items(Fields({"name": Listed("pullSecrets")}, needed=("name",))),
    "nodeSelector": Fields({}, parameter="nodeSelectors"),
    "priorityClassName": Listed("priorityClasses"),
    "schedulerName": one_of("default-scheduler"),
    "securityContext": Fields(
        {
            "runAsNonRoot": YES,
            "runAsUser": one_of(_USER),
            "runAsGroup": one_of(_USER),
            "fsGroup": one_of(_USER),
            "seccompProfile": Fields({"type": one_of("RuntimeDefault")}, needed=("type",)),
        },
        needed=("runAsNonRoot", "runAsUser", "seccompProfile"),
    ),
    "tolerations": _TOLERATIONS,
}
_NEEDED = ("containers", "securityContext")
# What admission adds to a pod; Kubernetes itself checks it against the PriorityClass.
_ADDED = scalars("preemptionPolicy", "priority")


def _volumes(**sources: Rule) -> Items:
    return Items(Fields({**scalars("name"), "emptyDir": _EMPTY_DIR, **sources}))


_DASK: dict[str, Rule] = {
    **_POD,
    "automountServiceAccountToken": NO,
    "containers": _one_container(_DASK_COMMAND),
    "terminationGracePeriodSeconds": _DASK_GRACE,
    "volumes": _volumes(secret=_TLS),
}
_DASK_NEEDED = (*_NEEDED, "automountServiceAccountToken")
_DRIVER: dict[str, Rule] = {
    **_POD,
    **scalars("automountServiceAccountToken"),
    "containers": _one_container(_DRIVER_COMMAND),
    "terminationGracePeriodSeconds": _DRIVER_GRACE,
    "serviceAccountName": Listed("serviceAccounts"),
    "serviceAccount": Listed("serviceAccounts"),
    "volumes": _volumes(),
}
_DRIVER_NEEDED = (*_NEEDED, "serviceAccountName")
# In a Job, and in a DaskCluster.
DRIVER_TEMPLATE = Fields(_DRIVER, needed=_DRIVER_NEEDED)
DASK_TEMPLATE = Fields(_DASK, needed=_DASK_NEEDED)

_NO_ACCOUNT = one_of("default")  # Kubernetes sets it; without a token it gives nothing
DASK_POD = Fields(
    {**_DASK, **_ADDED, "serviceAccountName": _NO_ACCOUNT, "serviceAccount": _NO_ACCOUNT}, needed=_DASK_NEEDED
)
# As the API server has them when it admits them.
DRIVER_POD = Fields({**_DRIVER, **_ADDED, "volumes": _volumes(projected=_TOKEN)}, needed=_DRIVER_NEEDED)

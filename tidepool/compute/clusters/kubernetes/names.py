"""Names and ports that driver, Dask pods and operator agree on. Standard library only: `operate` imports it."""

from __future__ import annotations

import re

GROUP = "kubernetes.dask.org/v1"
SCHEDULER_PORT = 8786
HTTP_PORT = 8787
WORKER_PORT = 8788
# Key and certificate of a cluster, as files of its pods, from a Secret of this type.
TLS_TYPE = "kubernetes.io/tls"
TLS_FOLDER = "/run/tidepool/tls"

# What tidepool made: nothing else is ever deleted.
OURS = {"app.kubernetes.io/part-of": "tidepool", "app.kubernetes.io/managed-by": "tidepool"}
# Of the Dask operator, on every part of a cluster: its name.
LABEL_CLUSTER = "dask.org/cluster-name"
# Never prefect.io/flow-run-id: the Dask operator copies labels to its pods, and a pod with that label is a driver, for
# Prefect and for tidepool.
LABEL_RUN = "tidepool.dev/flow-run-id"
LABEL_SHARED = "tidepool.dev/shared-cluster"
# Of all annotations of ours. Admission lets a run write no others.
OWN_ANNOTATIONS = "tidepool.dev/"
ANNOTATION_DEPLOYMENT = "tidepool.dev/deployment"
# Seconds that a cluster may exist, whatever it does.
ANNOTATION_DEADLINE = "tidepool.dev/deadline-seconds"
# The driver's pod. Admission lets a run create and delete only clusters that name its own.
ANNOTATION_DRIVER = "tidepool.dev/driver"
ANNOTATION_IMAGE = "tidepool.dev/image"
ANNOTATION_VERSIONS = "tidepool.dev/versions"
ANNOTATION_WORKERS = "tidepool.dev/workers"

# The name of a run's cluster ends with so many characters of the uid of its driver's pod: admission refuses others, so
# no other run can take it, or a name made from it, beforehand. That of a shared cluster begins with the prefix.
UID_LENGTH = 8
SHARED_PREFIX = "shared-"

# Reason of the Warning event about an object that asks for more than a flow run may have.
REFUSED = "Refused"


def scheduler_service(cluster: str) -> str:
    """Return the name of the Service that the operator creates for a cluster's scheduler."""
    return f"{cluster}-scheduler"


def tls_secret(cluster: str) -> str:
    """Return the name of the Secret with a cluster's key and certificate; only the cluster's pods mount it.

    No other Secret of the namespace may have such a name: a run that names its cluster after it could mount it.
    """
    return f"{cluster}-dask-tls"


def scheduler_url(cluster: str, namespace: str) -> str:
    """Return the address of a scheduler's HTTP server inside the Kubernetes cluster."""
    return f"http://{scheduler_service(cluster)}.{namespace}:{HTTP_PORT}"


def slug(text: str) -> str:
    """Return a text as a part of a name of Kubernetes or Prefect: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"

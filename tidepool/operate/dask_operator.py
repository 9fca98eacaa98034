"""The Dask operator as tidepool runs it: `kopf run --module=tidepool.operate.dask_operator --namespace=…`.

It is dask-kubernetes' own controller. What is set here lets it live with a Role instead of a ClusterRole.
"""

from __future__ import annotations

import logging
from typing import Any

import dask_kubernetes.operator.controller  # noqa: F401 - registers the handlers of DaskCluster and its parts
import kopf


@kopf.on.startup()
def serve_one_namespace(settings: kopf.OperatorSettings, **_: Any) -> None:  # noqa: ANN401 - kopf passes all it has
    """Serves the namespace of `--namespace` at once and keeps the log to what happens to clusters.

    By default kopf lists the namespaces and custom resource definitions of the whole cluster first. Forbidden by a
    Role, it tries nine times in 54 seconds, in which it answers its liveness probe and ignores every DaskCluster.
    """
    settings.scanning.disabled = True
    for noisy in ("httpx", "aiohttp.access", "kopf.activities.probe"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("kopf.objects").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the line that each cluster's idle timer writes every five seconds."""
    message = record.getMessage()
    return not (message.startswith("Timer ") and message.endswith(" succeeded."))

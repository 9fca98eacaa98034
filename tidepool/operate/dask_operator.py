"""The Dask operator as tidepool runs it: `kopf run --module=tidepool.operate.dask_operator --namespace=…`.

It is dask-kubernetes' own controller. What is set here lets it live with a Role instead of a ClusterRole.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import kopf
from dask_kubernetes.operator import controller  # registers the handlers of DaskCluster and its parts

# Seconds that the operator waits for a scheduler to say since when it is idle. It asks every five seconds.
_IDLE_SECONDS = 4.0
_check_scheduler_idle = controller.check_scheduler_idle


@kopf.on.startup()
def serve_one_namespace(settings: kopf.OperatorSettings, **_: Any) -> None:  # noqa: ANN401 - kopf passes all it has
    """Serves the namespace of `--namespace` at once and keeps the log to what happens to clusters.

    By default kopf lists the namespaces and custom resource definitions of the whole cluster first. Forbidden by a
    Role, it tries nine times in 54 seconds, in which it answers its liveness probe and ignores every DaskCluster.
    """
    settings.scanning.disabled = True
    # A cluster that is removed while its idle timer asks the scheduler keeps its finalizer until kopf looks again: by
    # default a minute later.
    settings.background.cancellation_polling = 1.0
    controller.check_scheduler_idle = _check_idle
    for noisy in ("httpx", "aiohttp.access", "kopf.activities.probe"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("kopf.objects").addFilter(_is_news)


async def _check_idle(*args: Any, **kwargs: Any) -> float:  # noqa: ANN401 - passed on as they are
    """Upstream's question without its patience: packets to a pod that is gone are lost, not refused, for half a minute.

    A cluster cannot go as long as somebody waits there for the answer.

    Raises:
        TimeoutError: no answer; upstream logs it and asks again.
    """
    return await asyncio.wait_for(_check_scheduler_idle(*args, **kwargs), _IDLE_SECONDS)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the line that each cluster's idle timer writes every five seconds."""
    message = record.getMessage()
    return not (message.startswith("Timer ") and message.endswith(" succeeded."))

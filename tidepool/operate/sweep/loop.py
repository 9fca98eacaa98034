"""The loop in the Dask operator: what flow runs have left behind is deleted within seconds, whoever has died."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

import kr8s
import kr8s.asyncio

from tidepool.compute.clusters.kubernetes.names import GROUP
from tidepool.errors import TidepoolError
from tidepool.operate.sweep.leftovers import Leftover, leftovers
from tidepool.operate.sweep.observation import NO_ANSWER, PARTS, REQUEST_SECONDS, connect, observe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from tidepool.operate.sweep.figures import SweepFigures
    from tidepool.operate.sweep.observation import Observation

_POLL_SECONDS = 3.0
_PATHS = {
    "DaskCluster": (GROUP, "daskclusters"),
    "Job": ("batch/v1", "jobs"),
    **{kind: where[:2] for kind, where in PARTS.items()},
}
_log = logging.getLogger(__name__)


class DeletionError(TidepoolError):
    """Something that is left behind could not be deleted."""


@dataclass
class Exchange:
    """News between the sweep and `flow_run_loop.watch`; without the latter nothing reads them.

    Attributes:
        finished: When a flow run has ended Completed, Failed or Cancelled, by id, as the Prefect server says.
        removed: Dask clusters that the sweep has deleted, for the Prefect server to hear of.
    """

    finished: dict[str, datetime] = field(default_factory=dict)
    removed: deque[Leftover] = field(default_factory=lambda: deque(maxlen=1000))


async def watch(namespaces: Sequence[str], exchange: Exchange, figures: SweepFigures) -> None:
    """Sweep the namespaces every three seconds, until cancelled. One part that fails does not keep the others."""
    problems, api = Problems(), None
    while True:
        for namespace in namespaces:
            with problems.of(f"sweep of namespace {namespace}"):
                api = api or await connect()
                await _sweep(api, namespace, exchange, problems, figures)
        await asyncio.sleep(_POLL_SECONDS)


async def _sweep(
    api: kr8s.asyncio.Api, namespace: str, exchange: Exchange, problems: Problems, figures: SweepFigures
) -> None:
    """Observe a namespace, and do what follows from that."""
    observation = await observe(api, namespace)
    with problems.of(f"Dask clusters of namespace {namespace}"):
        async for each in delete_leftovers(api, observation, exchange.finished):
            figures.deleted(each)
            if each.kind == "DaskCluster":
                exchange.removed.append(each)
    # After the deletions: these go on without it.
    with problems.of(f"figures of namespace {namespace}"):
        figures.observed(observation, leftovers(observation, exchange.finished, datetime.now(UTC)))


async def delete_leftovers(
    api: kr8s.asyncio.Api, observation: Observation, finished: Mapping[str, datetime]
) -> AsyncIterator[Leftover]:
    """Delete what is left behind in a namespace, without waiting for its pods; yield what was there to delete.

    Args:
        api: The Kubernetes API.
        observation: All of the namespace.
        finished: When a flow run has ended, by id, as `leftovers` needs it; empty if it is unknown.

    Raises:
        DeletionError: after all deletions: some were refused; or at once: the API does not answer.
    """
    refused = []
    for each in leftovers(observation, finished, datetime.now(UTC)):
        try:
            existed = await delete(api, each)
        except _RefusedError as error:
            refused.append(str(error))
            continue
        if existed:
            _log.info("%s %s in namespace %s deleted: %s", each.kind, each.name, each.namespace, each.reason)
            yield each
    if refused:
        raise DeletionError(f"{len(refused)} not deleted: {refused[0]}")


async def delete(api: kr8s.asyncio.Api, leftover: Leftover) -> bool:
    """Delete one object with all that it owns; return False if it was gone.

    Raises:
        DeletionError: refused, or no answer.
    """
    version, path = _PATHS[leftover.kind]
    options = {"propagationPolicy": "Background", "preconditions": {"uid": leftover.uid}}
    what = f"{leftover.kind} {leftover.name} in namespace {leftover.namespace}"
    try:
        async with api.call_api(
            "DELETE",
            version=version,
            namespace=leftover.namespace,
            url=f"{path}/{leftover.name}",
            content=json.dumps(options),
            timeout=REQUEST_SECONDS,
        ):
            return True
    except kr8s.ServerError as error:
        status = HTTPStatus.SERVICE_UNAVAILABLE if error.response is None else error.response.status_code
        if status in {HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT}:  # CONFLICT: another object has its name now
            return False
        raise _RefusedError(f"Kubernetes refused to delete {what}: {error}") from error
    except NO_ANSWER as error:
        raise DeletionError(f"no answer from Kubernetes to delete {what}: {error or type(error).__name__}") from error


class _RefusedError(DeletionError):
    """The API answered, and did not delete it."""


class Problems:
    """Problems of the parts of a loop, each logged when it begins, changes and ends."""

    def __init__(self) -> None:
        self._logged: dict[str, str] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Log what a part of the loop raises, and go on after it."""
        problem, unexpected = "", None
        try:
            yield
        except TidepoolError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 - an object of one run must not stop the operator of all
            problem, unexpected = f"{type(error).__name__}: {error}", error
        if problem != self._logged.get(part, ""):
            _log.warning("%s: %s", part, problem or "works again", exc_info=unexpected)
        self._logged[part] = problem

"""The loop in the Dask operator that tells the Prefect server what Kubernetes knows about flow runs.

It is a loop of its own: a Prefect server that does not answer delays no deletion of a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tidepool.compute.clusters.kubernetes.names import LABEL_RUN
from tidepool.errors import TidepoolError
from tidepool.operate.sweep.drivers import LABEL_FLOW_RUN, being_deleted, with_gone
from tidepool.operate.sweep.flow_runs import FINAL, decisions, ended
from tidepool.operate.sweep.leftovers import Leftover
from tidepool.operate.sweep.loop import Exchange, Problems, delete
from tidepool.operate.sweep.observation import connect, observe
from tidepool.operate.sweep.prefect_api import connect as connect_to_prefect
from tidepool.operate.sweep.prefect_api import one_pass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import kr8s.asyncio

    from tidepool.operate.sweep.dask_workers import DaskWorkers
    from tidepool.operate.sweep.observation import Object, Observation
    from tidepool.operate.sweep.prefect_api import FlowRuns
    from tidepool.operate.sweep.records import Decision

_POLL_SECONDS = 3.0
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_log = logging.getLogger(__name__)


class DecisionError(TidepoolError):
    """Something that was decided about a flow run could not be done."""


async def watch(namespaces: Sequence[str], pools: Sequence[str], exchange: Exchange, workers: DaskWorkers) -> None:
    """Look after the flow runs of the work pools every three seconds, until cancelled.

    Args:
        namespaces: All namespaces of flow runs.
        pools: Names of the work pools.
        exchange: What the sweep has deleted, and where it reads which runs have ended.
        workers: Dask workers, for the reports of runs.

    Raises:
        UsageError: PREFECT_API_URL is not set.
    """
    problems, api = Problems(), None
    seen: dict[str, Object] = {}
    async with connect_to_prefect(pools, namespaces) as server:
        while True:
            with problems.of("flow runs"):
                api = api or await connect()
                await look(api, server, namespaces, exchange, seen, workers)
            await asyncio.sleep(_POLL_SECONDS)


async def look(
    api: kr8s.asyncio.Api,
    server: FlowRuns,
    namespaces: Sequence[str],
    exchange: Exchange,
    seen: dict[str, Object],
    workers: DaskWorkers,
) -> None:
    """Read the flow runs, then all namespaces, and do what follows. Without a part of the picture nothing is done.

    In this order: a run that had begun when it was read had its Job before the Jobs were read.

    Args:
        api: The Kubernetes API.
        server: The Prefect server.
        namespaces: All namespaces of flow runs.
        exchange: What the sweep has deleted, and where it reads which runs have ended.
        seen: Drivers that were being deleted the last time, by uid; kept up to date.
        workers: Dask workers; is shown the clusters.

    Raises:
        TidepoolError: a reading failed, or not everything could be done.
    """
    async with one_pass():
        while exchange.removed:
            await server.report_removed(exchange.removed[0])
            exchange.removed.popleft()
        runs = await server.read(datetime.now(UTC))
    now = datetime.now(UTC)
    observations = [with_gone(await observe(api, each, parts=False), seen) for each in namespaces]
    seen.clear()
    seen.update(being_deleted(observations))
    for each in observations:
        workers.see_clusters(each, now)
    async with one_pass():
        runs += await server.read_by_id(_mentioned(observations) - {each.id for each in runs})
    exchange.finished = ended(runs)
    await carry_out(api, server, decisions(observations, runs, now), workers)


async def carry_out(api: kr8s.asyncio.Api, server: FlowRuns, decided: Iterable[Decision], workers: DaskWorkers) -> None:
    """Set the states and delete the Jobs of decisions; one that fails does not keep the others.

    Args:
        api: The Kubernetes API.
        server: The Prefect server.
        decided: The decisions.
        workers: Dask workers, for the reports of runs that have ended by that.

    Raises:
        DecisionError: after all others: some were not carried out.
    """
    failed = []
    for each in decided:
        try:
            await _carry_out(api, server, each, workers)
        except TidepoolError as error:
            failed.append(f"flow run {each.run.id}: {error}")
        except Exception as error:  # noqa: BLE001 - what is not understood of one run must not keep all others
            failed.append(f"flow run {each.run.id}: {type(error).__name__}: {error}")
    if failed:
        raise DecisionError(f"{len(failed)} decisions not carried out: {failed[0]}")


async def _carry_out(api: kr8s.asyncio.Api, server: FlowRuns, decision: Decision, workers: DaskWorkers) -> None:
    run, state = decision.run, decision.state
    if decision.problem:
        raise DecisionError(decision.problem)
    if state is not None:
        async with one_pass():
            accepted = await server.set_state(decision)
        if not accepted:
            return
        _log.info("flow run %s (%s) is %s: %s", run.name, run.id, state.name, state.message)
    for job in decision.jobs:
        reason = f"flow run {run.name} is {state.name if state else run.state.name}"
        if await delete(api, Leftover("Job", job.namespace, job.name, job.uid, reason)):
            _log.info("Job %s in namespace %s deleted: %s", job.name, job.namespace, reason)
    if state is not None and state.type in FINAL:
        # Whatever the driver did: it can no longer report the state that it has been given here.
        async with one_pass():
            await server.report_end(run, workers)
    if state is not None:
        # Last: nothing of the above is made again when this fails.
        async with one_pass():
            await server.log(decision)


def _mentioned(observations: Iterable[Observation]) -> set[str]:
    """Return the ids of the flow runs that Jobs and clusters belong to."""
    found = set()
    for each in observations:
        for label, objects in ((LABEL_FLOW_RUN, each.jobs), (LABEL_RUN, each.clusters)):
            found |= {(one["metadata"].get("labels") or {}).get(label, "") for one in objects}
    return {each for each in found if _ID.fullmatch(each)}

"""The calls of the Prefect server that the loop makes: reading flow runs, setting their states."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from tidepool.errors import TidepoolError, UsageError
from tidepool.operate import unreadable
from tidepool.operate.sweep import reports
from tidepool.operate.sweep.flow_runs import needs_history
from tidepool.operate.sweep.records import FlowRun, State, policy
from tidepool.report import history

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from prefect.client.orchestration import PrefectClient

    from tidepool.operate.sweep.dask_workers import DaskWorkers
    from tidepool.operate.sweep.leftovers import Leftover
    from tidepool.operate.sweep.records import Decision

Json = dict[str, Any]

# All calls of one pass of the loop. A busy server answers one in seconds.
_PASS_SECONDS = 20.0
# Objects per request, and ids in a filter: the server's limit.
_PAGE = 200
# A changed policy counts after so many seconds at the latest.
_CACHED_SECONDS = 30.0
# A crash that the loop could not see at once, such as one while the operator was away, is retried for so long.
_RECENT = timedelta(hours=1)
_UNFINISHED = ("PENDING", "RUNNING", "CANCELLING", "PAUSED")
_log = logging.getLogger(__name__)


class PrefectServerError(TidepoolError):
    """The Prefect server does not answer, or rejected a request."""


class FlowRuns:
    """The flow runs of the work pools whose Jobs are in certain namespaces. Of one event loop only."""

    def __init__(self, client: PrefectClient, pools: Sequence[str], namespaces: Sequence[str]) -> None:
        self._client = client
        self._names = pools
        self._namespaces = namespaces
        self._pools: dict[str, Json] = {}
        self._deployments: dict[str, Json] = {}
        self._histories: dict[tuple[str, str], tuple[State, ...]] = {}
        self._forget = 0.0
        self._unread: dict[str, None] = {}

    async def read(self, now: datetime) -> list[FlowRun]:
        """Return the runs that have not ended or have crashed within the last hour, and those that are due."""
        if time.monotonic() > self._forget:
            self._deployments = {}
            self._pools = await self._served()
            self._forget = time.monotonic() + _CACHED_SECONDS
        if not self._pools:
            return []
        found: dict[str, Json] = {}
        for criteria in (
            {"state": {"type": {"any_": list(_UNFINISHED)}}},
            {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": {"before_": now.isoformat()}},
            {"state": {"type": {"any_": ["CRASHED"]}}, "end_time": {"after_": (now - _RECENT).isoformat()}},
        ):
            body = {"flow_runs": criteria, "work_pools": {"name": {"any_": list(self._pools)}}}
            found |= {each["id"]: each for each in await self._pages("/flow_runs/filter", body)}
        listed = [await self._with_history(each, now) for each in await self._flow_runs(found.values())]
        runs = [each for each in listed if each]
        current = {(each.id, each.state.id) for each in runs}
        self._histories = {key: each for key, each in self._histories.items() if key in current}
        return runs

    async def read_by_id(self, ids: Iterable[str]) -> list[FlowRun]:
        """Return those of these flow runs that exist and belong to one of the work pools, without their history."""
        found, wanted = [], sorted(ids)
        for start in range(0, len(wanted), _PAGE):
            body = {"flow_runs": {"id": {"any_": wanted[start : start + _PAGE]}}}
            found += await self._pages("/flow_runs/filter", body)
        return await self._flow_runs(each for each in found if each["work_pool_name"] in self._pools)

    async def set_state(self, decision: Decision) -> bool:
        """Set the state of a decision; return False if the run has another state by now, or the server refuses.

        Never forced: the server itself keeps a final state, and a Running that has come in between.
        """
        from prefect.client.schemas.objects import State as PrefectState
        from prefect.client.schemas.objects import StateDetails, StateType
        from prefect.client.schemas.responses import SetStateStatus

        run, wanted = decision.run, decision.state
        if wanted is None:
            return True
        current = await self._request("GET", f"/flow_runs/{run.id}")
        if current["state"]["id"] != run.state.id:
            return False
        due = wanted.since if wanted.type == "SCHEDULED" else None
        state: PrefectState[Any] = PrefectState(
            type=StateType(wanted.type),
            name=wanted.name,
            message=wanted.message,
            state_details=StateDetails(scheduled_time=cast("Any", due)),
        )
        result = await self._client.set_flow_run_state(run.id, state)
        return result.status == SetStateStatus.ACCEPT

    async def report_end(self, run: FlowRun, workers: DaskWorkers) -> None:
        """Publish the report of a flow run whose driver cannot: that the server has given a final state just now."""
        found = await self._request("GET", f"/flow_runs/{run.id}")
        deployment = self._deployments.get(run.deployment) or {}
        name = deployment.get("name") or (await self._request("GET", f"/flows/{found['flow_id']}"))["name"]
        only = {"flow_runs": {"id": {"any_": [run.id]}}}
        body = {**only, "sort": "END_TIME_DESC", "limit": _PAGE}
        task_runs = await self._request("POST", "/task_runs/filter", json=body)
        past: list[Json] = []
        if run.deployment:
            completed = {"state": {"type": {"any_": ["COMPLETED"]}}}
            body = {"deployments": {"id": {"any_": [run.deployment]}}, "flow_runs": completed}
            options = {"sort": "END_TIME_DESC", "limit": history.MOST}
            past = await self._request("POST", "/flow_runs/filter", json={**body, **options})
        artifact = reports.artifact(name, deployment, found, task_runs, past, _PAGE, workers)
        await self._request("POST", "/artifacts/", json=artifact)

    async def report_removed(self, cluster: Leftover) -> None:
        """Emit the event `tidepool.cluster.removed` about a Dask cluster that a flow run left behind."""
        run = {"prefect.resource.id": f"prefect.flow-run.{cluster.run}", "prefect.resource.role": "flow-run"}
        event = {
            "id": str(uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": "tidepool.cluster.removed",
            "resource": {
                "prefect.resource.id": f"tidepool.dask-cluster.{cluster.namespace}.{cluster.name}",
                "prefect.resource.name": cluster.name,
            },
            "related": [run] if cluster.run else [],
            "payload": {"namespace": cluster.namespace, "cluster": cluster.name, "reason": cluster.reason},
        }
        await self._request("POST", "/events", json=[event])

    async def log(self, decision: Decision) -> None:
        """Add the reason for a decided state to the log of its run, which could send nothing itself.

        The page of a run shows its log first, and its state's message on another tab.
        """
        state, output = decision.state, decision.output
        lines = [f"The last lines of its driver:\n{output}"] if output else []
        lines += [f"{state.name}: {state.message}"] if state and state.message else []
        entries = [
            {
                "name": "tidepool.operator",
                "level": logging.ERROR if state and state.type in {"CRASHED", "FAILED"} else logging.WARNING,
                "message": line,
                "timestamp": datetime.now(UTC).isoformat(),
                "flow_run_id": decision.run.id,
            }
            for line in lines
        ]
        if entries:
            await self._request("POST", "/logs/", json=entries)

    async def _served(self) -> dict[str, Json]:
        """Return the work pools, by name: those of Kubernetes, with Jobs in one of the namespaces."""
        pools = await self._pages("/work_pools/filter", {"work_pools": {"name": {"any_": list(self._names)}}})
        return {
            each["name"]: each
            for each in pools
            if each["type"] == "kubernetes"
            and (each["base_job_template"].get("job_configuration") or {}).get("namespace") in self._namespaces
        }

    async def _flow_runs(self, found: Iterable[Json]) -> list[FlowRun]:
        listed = [each for each in found if each["state"]]
        missing = sorted({each["deployment_id"] for each in listed} - {None} - self._deployments.keys())
        for start in range(0, len(missing), _PAGE):
            body = {"deployments": {"id": {"any_": missing[start : start + _PAGE]}}}
            self._deployments |= {each["id"]: each for each in await self._pages("/deployments/filter", body)}
        return [self._flow_run(each) for each in listed]

    def _flow_run(self, each: Json) -> FlowRun:
        schema = self._pools[each["work_pool_name"]]["base_job_template"].get("variables") or {}
        defaults = {name: value.get("default") for name, value in (schema.get("properties") or {}).items()}
        deployment = self._deployments.get(each["deployment_id"] or "", {})
        created_by = each.get("created_by") or {}
        return FlowRun(
            id=each["id"],
            name=each["name"],
            state=_state(each["state"]),
            policy=policy(defaults, deployment.get("job_variables") or {}, each.get("job_variables") or {}),
            infrastructure=each["infrastructure_pid"] or "",
            deployment=each["deployment_id"] or "",
            schedule=str(created_by.get("id") or "") if each["auto_scheduled"] else "",
            expected=_time(each["expected_start_time"] or each["created"]),
            begun=each["start_time"] is not None,
        )

    async def _with_history(self, run: FlowRun, now: datetime) -> FlowRun | None:
        """Return a run with its earlier states, if they matter; None if the server cannot write them out."""
        from prefect.exceptions import PrefectHTTPStatusError

        if not needs_history(run, now):
            return run
        key = (run.id, run.state.id)
        if key not in self._histories:
            try:
                listed = await self._request("GET", "/flow_run_states/", params={"flow_run_id": run.id})
            except PrefectHTTPStatusError as error:
                if error.response.status_code != HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise
                self._warn(f"the states of flow run {run.id}")
                return None
            self._histories[key] = tuple(sorted((_state(each) for each in listed), key=lambda each: each.since))
        return replace(run, history=self._histories[key])

    async def _pages(self, path: str, body: Json) -> list[Json]:
        async def ask(offset: int, limit: int) -> list[Json]:
            return cast(
                "list[Json]", await self._request("POST", path, json={**body, "limit": limit, "offset": offset})
            )

        found: list[Json | None] = []
        while True:
            page = await unreadable.page(ask, len(found), _PAGE)
            found += page
            if len(page) < _PAGE:
                break
        if missing := found.count(None):
            self._warn(f"{missing} of {path}")
        return [each for each in found if each]

    def _warn(self, what: str) -> None:
        """Report once what the server cannot write out; it is left alone, and nothing takes it for gone."""
        if what in self._unread:
            return
        self._unread[what] = None
        while len(self._unread) > _PAGE:
            del self._unread[next(iter(self._unread))]
        _log.warning("the Prefect server cannot write out %s: left alone, the others are looked after", what)

    async def _request(self, method: str, path: str, **options: Any) -> Any:
        async def ask() -> Any:
            return await self._client.request(cast("Any", method), cast("Any", path), **options)

        reads = method == "GET" or path.endswith("/filter")
        answer = await (unreadable.answer(ask) if reads else ask())
        return answer.json() if answer.content else None


def _state(found: Json) -> State:
    return State(found["id"], found["type"], found["name"], found["message"] or "", _time(found["timestamp"]))


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


@asynccontextmanager
async def one_pass() -> AsyncIterator[None]:
    """Bound the calls of one pass of the loop; a call without an answer is left to the next pass.

    Raises:
        PrefectServerError: the server does not answer, or rejects a request.
    """
    import httpx
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

    try:
        async with asyncio.timeout(_PASS_SECONDS):
            yield
    except PrefectHTTPStatusError as error:
        where = f"{error.request.method} {error.request.url.path}"
        raise PrefectServerError(f"it rejected {where} ({error.response.status_code})") from error
    except ObjectNotFound as error:
        raise PrefectServerError("it has lost a flow run that it has just listed") from error
    except TimeoutError as error:
        raise PrefectServerError(f"no answer within {_PASS_SECONDS:g} s") from error
    except httpx.TransportError as error:
        raise PrefectServerError(f"no answer: {error or type(error).__name__}") from error


@asynccontextmanager
async def connect(pools: Sequence[str], namespaces: Sequence[str]) -> AsyncIterator[FlowRuns]:
    """Open a client of the server of PREFECT_API_URL, which tries nothing again; it connects with its first request.

    Args:
        pools: Names of the work pools whose runs are looked after, and no others'.
        namespaces: Where the Jobs of those runs are.

    Raises:
        UsageError: PREFECT_API_URL is not set.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    if not PREFECT_API_URL.value():
        raise UsageError("PREFECT_API_URL is not set, and TIDEPOOL_OPERATOR_WORK_POOLS is")
    # Here and not in each pass: Prefect builds all of its settings for it, tens of milliseconds in which the operator
    # does nothing else.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        async with get_client() as client:
            yield FlowRuns(client, pools, namespaces)

"""Reading the sources of `tidepool status`, side by side; each has its own time limit, and fails in words by itself."""

from __future__ import annotations

import asyncio
import re
import ssl
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import httpx

from tidepool.errors import TidepoolError, UsageError
from tidepool.operate.status import picture, schedules
from tidepool.settings import environment, settings
from tidepool.upstream import kr8s as upstream
from tidepool.upstream.prefect_settings import client_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping

    from tidepool.operate.status.picture import Json, Kubernetes, Overview, RunStatus
    from tidepool.upstream.prefect_settings import ClientSettings

T = TypeVar("T")

_PAGE = 200
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PREFIX = re.compile(r"[0-9a-f-]{6,35}")
# Pages in which a run is looked for by the beginning of its id.
_PAGES = 5
_FAILED = 5
_WARNINGS = 5
_WARNING_LEVEL = 30
_RECENT = timedelta(days=2)
_KINDS = ("COMPLETED", "FAILED", "CRASHED", "RUNNING", "PENDING", "SCHEDULED", "CANCELLED")
_POOLS = 20


class NotFoundError(UsageError):
    """There is no such flow run."""


class Sources:
    """The Prefect server and Kubernetes, as `tidepool status` reads them.

    Args:
        client: A client of the server's API.
        now: The time.

    Attributes:
        unknown: Sources that did not answer, with the reason.
    """

    def __init__(self, client: httpx.AsyncClient, now: datetime) -> None:
        self._client = client
        self._now = now
        self._seconds = settings().status.timeout_seconds
        self.unknown: dict[str, str] = {}

    async def overview(self) -> Overview:
        """Read what is wrong now."""
        parts = await asyncio.gather(
            self._part("prefect", self._runs()),
            self._part("pauses", self._paused()),
            self._part("work pools", self._work_pools()),
            self._part("schedules", self._schedules()),
            self._part("drift", self._drift()),
            self._part("kubernetes", self._elsewhere(self._orphans)),
        )
        findings = [each for found in parts for each in found or ()]
        return picture.Overview(findings, self.unknown)

    async def run(self, wanted: str) -> RunStatus:
        """Read one flow run.

        Args:
            wanted: Its id or the first six characters of it or more, its name, its URL in the UI; or a flow or
                deployment, for its last run.

        Raises:
            NotFoundError: there is none.
            TidepoolError: the server does not answer.
        """
        try:
            async with asyncio.timeout(2 * self._seconds):
                run = await self._find(wanted)
        except (httpx.HTTPError, TimeoutError) as error:
            raise TidepoolError(f"the Prefect server does not answer: {words(error)}") from error
        only = {"flow_runs": {"id": {"any_": [run["id"]]}}}
        states = {"task_runs": {"state": {"type": {"any_": ["FAILED", "CRASHED"]}}}}
        lines = {"logs": {"flow_run_id": {"any_": [run["id"]]}, "level": {"ge_": _WARNING_LEVEL}}}
        deployment, history, items, failed, warnings, kubernetes = await asyncio.gather(
            self._part("deployment", self._deployment(run)),
            self._part("history", self._get("/flow_run_states/", flow_run_id=run["id"])),
            self._part("items", self._items(only)),
            self._part("failed items", self._post("/task_runs/filter", {**only, **states, "limit": _FAILED})),
            self._part("log", self._post("/logs/filter", {**lines, "sort": "TIMESTAMP_DESC", "limit": _WARNINGS})),
            self._part("kubernetes", self._elsewhere(self._objects, run)),
        )
        states_in_order = sorted(history or [], key=lambda each: each["timestamp"])
        return picture.run_status(
            run,
            deployment or {"name": run["name"], "description": ""},
            states_in_order,
            items or {},
            failed or [],
            (warnings or [])[::-1],
            kubernetes,
            self.unknown,
            self._now,
        )

    # --- parts --------------------------------------------------------------------------------------------------------

    async def _part(self, name: str, reading: Coroutine[Any, Any, Any]) -> Any:
        """Return what a reading finds; None, and the reason in `unknown`, if it fails or takes too long."""
        try:
            async with asyncio.timeout(self._seconds):
                return await reading
        except TimeoutError:
            self.unknown[name] = f"no answer within {self._seconds:g} s"
        except (httpx.HTTPError, OSError, TidepoolError) as error:
            self.unknown[name] = words(error)
        return None

    async def _elsewhere(self, reading: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Read Kubernetes in a thread: the import of its client takes as long as all other parts."""

        async def read() -> T:
            async with asyncio.timeout(self._seconds):
                return await reading(*args)

        return await asyncio.to_thread(lambda: asyncio.run(read()))

    async def _runs(self) -> list[picture.Finding]:
        now = self._now.isoformat()
        live = {"state": {"type": {"any_": ["PENDING", "CANCELLING"]}}}
        due = {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": {"before_": now}}
        since = (self._now - _RECENT).isoformat()
        ends = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}, "end_time": {"after_": since}}
        oldest = {"sort": "EXPECTED_START_TIME_ASC", "limit": _PAGE}
        waiting, late, ended = await asyncio.gather(
            self._post("/flow_runs/filter", {"flow_runs": live, **oldest}),
            self._post("/flow_runs/filter", {"flow_runs": due, **oldest}),
            self._post("/flow_runs/filter", {"flow_runs": ends, "sort": "END_TIME_DESC", "limit": _PAGE}),
        )
        # A server takes 5 ms for each deployment: only those that something is said about.
        bad = [*waiting, *late, *(each for each in ended if each["state"]["type"] != "COMPLETED")]
        suspects = sorted({each["deployment_id"] for each in bad} - {None})[:_PAGE]
        names = {}
        if suspects:
            body = {"deployments": {"id": {"any_": suspects}}, "limit": _PAGE}
            names = {each["id"]: each["name"] for each in await self._post("/deployments/filter", body)}
        return [*picture.waiting((*waiting, *late), names, self._now), *picture.failing(ended, names, self._now)]

    async def _paused(self) -> list[picture.Finding]:
        deployments, variables = await asyncio.gather(
            self._post("/deployments/filter", {"deployments": {"paused": {"eq_": True}}, "limit": _PAGE}),
            self._post("/variables/filter", {"variables": {"tags": {"all_": ["tidepool:pause"]}}, "limit": _PAGE}),
        )
        return picture.paused(deployments, [each["value"] for each in variables], self._now)

    async def _work_pools(self) -> list[picture.Finding]:
        listed = await self._post("/work_pools/filter", {"limit": _PAGE})
        found = listed[:_POOLS]
        if len(listed) > _POOLS:
            self.unknown["work pools"] = f"only {_POOLS} of {len(listed)} were looked at"
        paths = [f"/work_pools/{quote(each['name'], safe='')}/workers/filter" for each in found]
        workers = await asyncio.gather(*(self._post(path, {"limit": _PAGE}) for path in paths))
        by_pool = {pool["name"]: each for pool, each in zip(found, workers, strict=True)}
        return picture.pools(found, by_pool, self._now)

    async def _schedules(self) -> list[picture.Finding]:
        future = {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": {"after_": self._now.isoformat()}}
        running = {"deployments": {"paused": {"eq_": False}}}
        every, ahead = await asyncio.gather(
            self._post("/deployments/count", running),
            self._post("/deployments/count", {**running, "flow_runs": future}),
        )
        if every == ahead:
            return []  # deployments themselves would take a server 5 ms each
        deployments = await self._post("/deployments/filter", {**running, "limit": _PAGE})
        names = schedules.scheduled(deployments, self._now)
        if every > len(deployments):
            self.unknown["schedules"] = f"only those of {len(deployments)} of {every} deployments were looked at"
        missing = set(names)
        for _ in range(_PAGES):
            if not missing:
                break
            body = {"deployments": {"id": {"any_": sorted(missing)}}, "flow_runs": future, "limit": _PAGE}
            page = await self._post("/flow_runs/filter", {**body, "sort": "EXPECTED_START_TIME_ASC"})
            missing -= {each["deployment_id"] for each in page}
            if len(page) < _PAGE:
                return schedules.without_next_run(names, missing)
        if missing:
            self.unknown["schedules"] = f"too many runs are ahead to look at the {len(missing)} schedules behind them"
        return []

    async def _drift(self) -> list[picture.Finding]:
        body = {"artifacts": {"key": {"any_": ["drift-report"]}}, "limit": 1}
        return picture.drift(await self._post("/artifacts/latest/filter", body), self._now)

    async def _orphans(self) -> list[picture.Finding]:
        _require_credentials()
        from tidepool.operate.sweep.leftovers import leftovers
        from tidepool.operate.sweep.observation import connect, observe
        from tidepool.upstream.kr8s import close_connection

        api = await connect()
        try:
            names = settings().operator.namespaces.split() or [api.namespace]
            observed = await asyncio.gather(*(observe(api, each) for each in names))
        finally:
            await close_connection(api)
        return [each for one in observed for each in picture.orphans(leftovers(one, {}, self._now))]

    async def _find(self, wanted: str) -> Json:
        wanted = wanted.strip()
        if ids := _ID.findall(wanted.lower()):
            if found := await self._flow_runs({"id": {"any_": [ids[-1]]}}):
                return found[0]
            raise NotFoundError(f"the server has no flow run {ids[-1]}")
        if found := await self._flow_runs({"name": {"any_": [wanted]}}):
            return found[0]
        if _PREFIX.fullmatch(wanted.lower()) and (run := await self._by_prefix(wanted.lower())):
            return run
        begun = {"start_time": {"is_null_": False}}
        flow, _, deployment = wanted.rpartition("/")
        chosen: dict[str, Any] = {"deployments": {"name": {"any_": [deployment]}}}
        if flow:
            chosen["flows"] = {"name": {"any_": [flow]}}
        for criteria in (chosen, {"flows": {"name": {"any_": [wanted]}}}):
            if found := await self._flow_runs(begun, **criteria):
                return found[0]
        raise NotFoundError(f"{wanted!r} is not a flow run (id, beginning of an id, name, URL), deployment or flow")

    async def _by_prefix(self, prefix: str) -> Json | None:
        begun = {"state": {"type": {"not_any_": ["SCHEDULED"]}}}
        pages = await asyncio.gather(*(self._flow_runs(begun, offset=at * _PAGE) for at in range(_PAGES)))
        found = {each["id"]: each for page in pages for each in page if each["id"].startswith(prefix)}
        if len(found) > 1:
            raise NotFoundError(f"{prefix!r} is the beginning of {len(found)} flow runs: {', '.join(sorted(found))}")
        return next(iter(found.values()), None)

    async def _flow_runs(self, criteria: Mapping[str, Any], offset: int = 0, **others: Any) -> list[Json]:
        body = {"flow_runs": criteria, "sort": "EXPECTED_START_TIME_DESC", "limit": _PAGE, "offset": offset, **others}
        found: list[Json] = await self._post("/flow_runs/filter", body)
        return [each for each in found if each["state"]]

    async def _deployment(self, run: Json) -> Json:
        if run["deployment_id"]:
            found: Json = await self._get(f"/deployments/{run['deployment_id']}")
            return found
        flow: Json = await self._get(f"/flows/{run['flow_id']}")
        return {"name": flow["name"], "description": ""}

    async def _items(self, only: Mapping[str, Any]) -> dict[str, int]:
        bodies = [{**only, "task_runs": {"state": {"type": {"any_": [kind]}}}} for kind in _KINDS]
        counts = await asyncio.gather(*(self._post("/task_runs/count", body) for body in bodies))
        return {kind: count for kind, count in zip(_KINDS, counts, strict=True) if count}

    async def _objects(self, run: Json) -> Kubernetes | None:
        """Return what Kubernetes has of a run; None for one that does not run there."""
        namespace, colon, _ = str(run["infrastructure_pid"] or "").partition(":")
        if not colon or picture.is_process(run):
            return None
        _require_credentials()
        from tidepool.compute.clusters.kubernetes.names import GROUP, LABEL_RUN
        from tidepool.operate.sweep.drivers import LABEL_FLOW_RUN
        from tidepool.operate.sweep.observation import connect, listed
        from tidepool.upstream.kr8s import close_connection

        api = await connect()
        own, dask = f"{LABEL_FLOW_RUN}={run['id']}", f"{LABEL_RUN}={run['id']}"
        try:
            jobs, pods, clusters, dask_pods = await asyncio.gather(
                listed(api, namespace, "jobs", "batch/v1", own),
                listed(api, namespace, "pods", "v1", own),
                listed(api, namespace, "daskclusters", GROUP, dask),
                listed(api, namespace, "pods", "v1", dask),
            )
        finally:
            await close_connection(api)
        return picture.Kubernetes(jobs, pods, clusters, dask_pods)

    async def _get(self, path: str, **parameters: str) -> Any:
        answer = await self._client.get(path, params=parameters)
        return answer.raise_for_status().json()

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        answer = await self._client.post(path, json=body)
        return answer.raise_for_status().json()


def _require_credentials() -> None:
    """Refuse before the import of Kubernetes' client where there is nothing to connect with."""
    try:
        upstream.require_credentials(environment().get("KUBECONFIG", ""))
    except ValueError as error:
        raise TidepoolError(str(error)) from error


@asynccontextmanager
async def connect(default_api: str = "") -> AsyncIterator[Sources]:
    """Open the sources; argument and error are those of `client`."""
    async with client(default_api) as opened:
        yield Sources(opened, datetime.now(UTC))


@asynccontextmanager
async def client(default_api: str = "") -> AsyncIterator[httpx.AsyncClient]:
    """Open a client of the Prefect server's API, by the settings of Prefect's own client.

    Args:
        default_api: URL of the API if PREFECT_API_URL is not set.

    Raises:
        UsageError: PREFECT_API_URL is not set.
    """
    # Not Prefect's client, whose import alone takes longer than all requests.
    found = client_settings()
    url = found.url or default_api
    if not url:
        raise UsageError(
            "PREFECT_API_URL is not set; set it to the API of the Prefect server (http://host:4200/api), or start "
            "`make demo`, which has the runs of `tidepool run` too"
        )
    user, _, secret = found.password.partition(":")
    async with httpx.AsyncClient(
        base_url=url,
        auth=(user, secret) if found.password else None,
        headers=found.headers,
        verify=_verification(url, found),
        timeout=settings().status.timeout_seconds,
    ) as opened:
        yield opened


def _verification(url: str, api: ClientSettings) -> ssl.SSLContext | bool:
    """Return how to verify the server's certificate, by the settings of Prefect's client."""
    if api.unverified or not url.startswith("https:"):
        return False  # without TLS, loading certificates would take 60 ms
    return ssl.create_default_context(cafile=api.certificates) if api.certificates else True


def words(error: BaseException) -> str:
    """Return why a source did not answer."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"it rejected {error.request.method} {error.request.url.path} ({error.response.status_code})"
    return str(error) or type(error).__name__

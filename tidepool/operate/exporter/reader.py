"""The exporter's requests to the Prefect server: few, of bounded size, and none for each deployment or run."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from tidepool.operate import unreadable
from tidepool.operate.exporter import records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prefect.client.orchestration import PrefectClient

    from tidepool.operate.exporter.records import Deployment, Json, Pool, Run

# Objects per request, and ids in a filter: the server's limit.
PAGE = 200
# Requests of one refresh, beside those for the inventory.
REQUESTS = 12
_LIVE_PAGES = 5
_DUE_PAGES = 2
# At least; the rest if it is not needed.
_FINISHED_PAGES = 2
_WORKER_REQUESTS = 2
_MOST_POOLS = 20
# A run's end may reach the server so much later than it was.
_OVERLAP_SECONDS = 60.0
_log = logging.getLogger(__name__)


@dataclass
class Fact:
    """The latest ends of one deployment's runs.

    Attributes:
        success: End of its last Completed run; None if there is none.
        failures: Failed and Crashed runs since then.
        asked: The server was asked for the runs that ended before the exporter started.
    """

    success: float | None = None
    failures: int = 0
    asked: bool = False


@dataclass
class Inventory:
    """The part of the server that rarely changes.

    Attributes:
        deployments: Deployments by id.
        pools: Work pools by name.
    """

    deployments: dict[str, Deployment] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=dict)


@dataclass
class Reading:
    """The result of one refresh.

    Attributes:
        live: Flow runs that have not ended, or are due.
        finished: Flow runs that have ended since the last refresh, oldest first.
        truncated: Parts that are incomplete.
        requests: Requests that it took.
    """

    live: list[Run] = field(default_factory=list)
    finished: list[Run] = field(default_factory=list)
    truncated: set[str] = field(default_factory=set)
    requests: int = 0


@dataclass
class _Scan:
    """A scan of the runs that ended between two times, over several requests.

    Attributes:
        after: The earlier time, Unix time.
        before: The later time.
        offset: Runs that were read.
        found: These runs.
        done: All were read.
    """

    after: float
    before: float
    offset: int = 0
    found: list[Run] = field(default_factory=list)
    done: bool = False


class Reader:
    """Reads one Prefect server, again and again.

    Args:
        client: A client of it.
        most_deployments: Deployments beyond this number are not told apart.
        observe: Is given the seconds of each request.
        started: Time from which on finished runs are counted, Unix time.
    """

    def __init__(
        self, client: PrefectClient, most_deployments: int, observe: Callable[[float], None], started: float
    ) -> None:
        self._client = client
        self._most = most_deployments
        self._observe = observe
        self._started = started
        self._scan = _Scan(after=started, before=started, done=True)
        self._seen: dict[tuple[str, float], None] = {}
        self._workers_due: deque[str] = deque()
        self._next_unasked: set[str] = set()
        self._failures_unasked: set[str] = set()
        self._left = 0
        self._requests = 0
        self._unread = False
        self._inventory_truncated: set[str] = set()
        self.inventory = Inventory()
        self.next: dict[str, float] = {}
        self.heartbeats: dict[str, float] = {}
        self.online: dict[str, int] = {}
        self.facts: dict[str, Fact] = {}

    async def read_inventory(self) -> None:
        """Read deployments, flows and work pools again: one request per 200, at 1 s per 200 deployments."""
        found: list[Json] = []
        truncated = set()
        while len(found) < self._most:
            limit = min(PAGE, self._most - len(found))
            body = {"sort": "NAME_ASC", "limit": limit, "offset": len(found)}
            page = await self._post("/deployments/filter", body)
            found += page
            if len(page) < limit:
                break
        else:
            truncated |= {"deployments"} if await self._post("/deployments/count", {}) > self._most else set()
        flows: dict[str, str] = {}
        for ids in _chunks({each["flow_id"] for each in found}):
            page = await self._post("/flows/filter", {"flows": {"id": {"any_": ids}}, "limit": PAGE})
            flows |= {each["id"]: each["name"] for each in page}
        pools = [records.pool(each) for each in await self._post("/work_pools/filter", {"limit": PAGE})]
        if len(pools) > _MOST_POOLS:
            truncated.add("work_pools")
        self.inventory = Inventory(
            {each["id"]: records.deployment(each, flows.get(each["flow_id"], "unknown")) for each in found},
            {each.name: each for each in pools[:_MOST_POOLS]},
        )
        self._inventory_truncated = truncated
        # A schedule may have changed, and with it the runs that the server has created.
        self._next_unasked = {id_ for id_, each in self.inventory.deployments.items() if each.schedules}
        for known in (self.next, self.facts):
            for gone in known.keys() - self.inventory.deployments.keys():
                del cast("dict[str, Any]", known)[gone]
        for names in (self.heartbeats, self.online):
            for gone in names.keys() - self.inventory.pools.keys():
                del cast("dict[str, Any]", names)[gone]
        polled = [each.name for each in pools[:_MOST_POOLS] if each.has_workers]
        self._workers_due = deque(sorted(polled, key=lambda name: name in self.heartbeats))

    async def refresh(self) -> Reading:
        """Read what changes, with at most `REQUESTS` requests."""
        self._left, self._requests = REQUESTS, 0
        reading = Reading(truncated=set(self._inventory_truncated))
        for _ in range(min(_WORKER_REQUESTS, len(self._workers_due))):
            await self._read_workers(self._workers_due[0])
            self._workers_due.rotate(-1)
        now = time.time()
        unfinished = {"state": {"type": {"any_": list(records.UNFINISHED)}}}
        due = {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": {"before_": _text(now)}}
        live = await self._pages("live", unfinished, _LIVE_PAGES, reading)
        reading.live = [*live, *await self._pages("due", due, _DUE_PAGES, reading)]
        await self._read_next(now)
        # After a start, until every deployment is known.
        await self._learn_successes()
        await self._learn_failures()
        # Last: after it nothing fails, so that each end is counted once.
        await self._read_finished(now, reading)
        reading.requests = self._requests
        return reading

    async def states(self, ids: Iterable[str]) -> dict[str, str]:
        """Return the present states of flow runs by id, of those that exist."""
        found: dict[str, str] = {}
        for some in _chunks(ids):
            page = await self._runs({"flow_runs": {"id": {"any_": some}}})
            found |= {each["id"]: records.run(each).state for each in page if each and each["state"]}
        return found

    async def _read_workers(self, pool: str) -> None:
        found = await self._ask(f"/work_pools/{quote(pool, safe='')}/workers/filter", {"limit": PAGE})
        beats = [records.time(each["last_heartbeat_time"]) for each in found if each["last_heartbeat_time"]]
        self.heartbeats[pool] = max(beats, default=0.0)
        self.online[pool] = sum(each["status"] == "ONLINE" for each in found)

    async def _pages(self, part: str, runs: Json, most: int, reading: Reading) -> list[Run]:
        """Return the flow runs of a filter; with too many of them, the oldest."""
        found: dict[str, Run] = {}
        for page in range(most):
            body = {"flow_runs": runs, "sort": "EXPECTED_START_TIME_ASC"}
            answer = await self._runs(body, page * PAGE)
            found |= {each["id"]: records.run(each) for each in answer if each and each["state"]}
            if len(answer) < PAGE:
                return list(found.values())
        reading.truncated.add(part)
        return list(found.values())

    async def _read_finished(self, now: float, reading: Reading) -> None:
        """Read the runs that have ended since the last complete scan; none is lost, but more take more refreshes."""
        if self._scan.done:
            self._scan = _Scan(after=max(self._started, self._scan.before - _OVERLAP_SECONDS), before=now)
        while not self._scan.done and self._left:
            limits = {"after_": _text(self._scan.after), "before_": _text(self._scan.before)}
            body = {"flow_runs": {"state": {"type": {"any_": list(records.FINAL)}}, "end_time": limits},
                    "sort": "END_TIME_DESC"}  # fmt: skip
            page = await self._runs(body, self._scan.offset)
            # A run that is recorded late moves the others to the next page: read twice, counted once.
            self._scan.offset += PAGE
            self._scan.done = len(page) < PAGE
            self._scan.found += [records.run(each) for each in page if each]
        if not self._scan.done:
            reading.truncated.add("finished")
            return
        new = {(each.id, each.ended or 0.0): each for each in self._scan.found}
        reading.finished = sorted(
            (new[key] for key in new.keys() - self._seen.keys()), key=lambda each: each.ended or 0
        )
        recent = self._scan.before - 2 * _OVERLAP_SECONDS
        self._seen = {key: None for key in (*self._seen, *new) if key[1] > recent}
        for each in reading.finished:
            self._tell(each)

    def _tell(self, run: Run) -> None:
        if run.deployment not in self.inventory.deployments:
            return
        fact = self.facts.setdefault(run.deployment, Fact())
        if run.state == "Completed":
            fact.success, fact.failures, fact.asked = run.ended, 0, True
        elif run.state in {"Failed", "Crashed"}:
            fact.failures += 1

    async def _read_next(self, now: float) -> None:
        """Read the next scheduled time of deployments for which it has passed or was not read yet."""
        active = {id_ for id_, each in self.inventory.deployments.items() if each.schedules}
        wanted = {id_ for id_ in active if id_ in self._next_unasked or self.next.get(id_, 0) <= now}
        for gone in self.next.keys() - active:
            del self.next[gone]
        ids = sorted(wanted, key=lambda id_: id_ not in self._next_unasked)[:PAGE]
        while ids and self._left > _FINISHED_PAGES:
            future = {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": {"after_": _text(now)}}
            order = {"sort": "EXPECTED_START_TIME_ASC"}
            body = {"deployments": {"id": {"any_": ids}}, "flow_runs": future, **order}
            answer = await self._runs(body)
            found: dict[str, float] = {}
            for each in filter(None, answer):
                found.setdefault(each["deployment_id"], records.time(each["expected_start_time"]))
            self.next |= found
            complete = len(answer) < PAGE
            for id_ in ids if complete else found:
                self._next_unasked.discard(id_)
                if id_ not in found:
                    self.next.pop(id_, None)
            ids = [] if complete else [id_ for id_ in ids if id_ not in found]

    async def _learn_successes(self) -> None:
        """Read when deployments had their last success before the exporter started."""
        unknown = [id_ for id_ in self.inventory.deployments if not self.facts.setdefault(id_, Fact()).asked][:PAGE]
        while unknown and self._left > _FINISHED_PAGES:
            answer = await self._runs(self._before_start(unknown, ["COMPLETED"]))
            for each in map(records.run, filter(None, answer)):
                fact = self.facts[each.deployment]
                if not fact.asked:
                    fact.success, fact.asked = each.ended, True
                    self._failures_unasked.add(each.deployment)
            if len(answer) < PAGE:
                for id_ in unknown:
                    if not self.facts[id_].asked:
                        self.facts[id_].asked = True
                        self._failures_unasked.add(id_)
            unknown = [id_ for id_ in unknown if not self.facts[id_].asked]

    async def _learn_failures(self) -> None:
        """Read the failures between that success and the start of the exporter."""
        unknown = sorted(self._failures_unasked)[:PAGE]
        while unknown and self._left > _FINISHED_PAGES:
            answer = await self._runs(self._before_start(unknown, ["FAILED", "CRASHED"]))
            told = set()
            for each in map(records.run, filter(None, answer)):
                fact = self.facts[each.deployment]
                told.add(each.deployment)
                if fact.success is None or (each.ended or 0) > fact.success:
                    fact.failures += 1
            known = told if len(answer) == PAGE else set(unknown)
            self._failures_unasked -= known
            unknown = [id_ for id_ in unknown if id_ not in known]

    def _before_start(self, deployments: list[str], types: list[str]) -> Json:
        runs = {"state": {"type": {"any_": types}}, "end_time": {"before_": _text(self._started)}}
        return {"deployments": {"id": {"any_": deployments}}, "flow_runs": runs, "sort": "END_TIME_DESC"}

    async def _runs(self, body: Json, offset: int = 0) -> list[Json | None]:
        """Return one page of flow runs, with None for one that the server cannot write out."""
        self._left -= 1

        async def ask(offset: int, limit: int) -> list[Json]:
            self._requests += 1
            found = await self._post("/flow_runs/filter", {**body, "limit": limit, "offset": offset})
            return cast("list[Json]", found)

        page = await unreadable.page(ask, offset, PAGE)
        if None in page and not self._unread:
            self._unread = True
            _log.warning("the Prefect server cannot write out a flow run: left out of the metrics")
        return page

    async def _ask(self, path: str, body: Json) -> list[Json]:
        self._left -= 1
        self._requests += 1
        return cast("list[Json]", await self._post(path, body))

    async def _post(self, path: str, body: Json) -> Any:
        begun = time.perf_counter()
        answer = await unreadable.answer(lambda: self._client.request("POST", cast("Any", path), json=body))
        self._observe(time.perf_counter() - begun)
        return answer.json()


def _chunks(ids: Iterable[str]) -> list[list[str]]:
    listed = sorted(ids)
    return [listed[start : start + PAGE] for start in range(0, len(listed), PAGE)]


def _text(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat()

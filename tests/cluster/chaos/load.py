"""The load suite, `make load`: many runs at once, many items, many deployments; what is lost or done twice, and memory.

`make test-cluster` does not run it, and neither does CI. LOAD_MINUTES (15) is the time of the deployments that run
every minute. Their runs have fake drivers: a thread that takes a due run as a Prefect worker does and reports its
states. With 200 pods a minute a node of two cores measures itself; the server, which is under test, sees no difference.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest
from installed import AUTH, FINAL
from results import RESULTS
from trials import Row, Trial, clean, nothing_to_do, now

from benchmarks.task_runner import code
from tests.polling import until

if TYPE_CHECKING:
    from kube import Namespace
    from world import World

MINUTES = float(os.environ.get("LOAD_MINUTES") or 15)
RUNS = 20
ITEMS = 10_000
DEPLOYMENTS = 200
# Two of them, as with `worker.replicas: 2`: both are offered the same runs.
FAKE_WORKERS = 2
FAKE_SECONDS = 2.0
PAGE = 200
PARTS = ("server", "worker", "operator")
TAG = "chaos-load"


def memory(namespace: Namespace) -> dict[str, int]:
    """Return the memory (MiB) that the processes of each part of the platform have, without the page cache."""
    # cgroup v2, else v1.
    script = "cat /sys/fs/cgroup/memory.stat 2>/dev/null || cat /sys/fs/cgroup/memory/memory.stat"
    found = {}
    for part in PARTS:
        printed = namespace.kubectl("exec", f"deployment/tidepool-{part}", "--", "sh", "-c", script)
        figures = dict(line.split(" ", 1) for line in printed.splitlines())
        found[part] = int(figures.get("anon") or figures["total_rss"]) // 2**20
    return found


def record(world: World, what: str, before: dict[str, int], **figures: Any) -> None:
    """Add a measurement to load.json, and make load.md from it: the newest of each kind."""
    data = RESULTS / "load.json"
    records = json.loads(data.read_text()) if data.exists() else {}
    after = memory(world.platform.namespace)
    records[what] = {**figures, "memory_before": before, "memory_after": after, "at": now(), "code": code()}
    data.write_text(json.dumps(records, indent=1) + "\n")
    sys.__stderr__.write(f"{what}: {records[what]}\n")
    lines = [
        "# Load",
        "",
        (
            "`make load` makes this table, on a Kubernetes cluster of one node (2 cores) with PostgreSQL, Redis and an "
            "S3 store. Memory is that of the processes, at the start and at the end, in MiB."
        ),
        "",
        f"| what | result | {' | '.join(PARTS)} | code |",
        f"|---|---|{'---|' * len(PARTS)}---|",
    ]
    for name, each in records.items():
        kept = [f"{each['memory_before'][part]} to {each['memory_after'][part]}" for part in PARTS]
        lines.append(f"| {name} | {each['result']} | {' | '.join(kept)} | {each['code']} |")
    (RESULTS / "load.md").write_text("\n".join(lines) + "\n")


@pytest.mark.timeout(0)
def test_twenty_runs_with_clusters_at_once(world: World) -> None:
    """The pool's limit is 10: the rest wait for a slot, and none is lost."""
    before = memory(world.platform.namespace)
    deployment = world.deployment("load-twenty")
    began = time.time()
    runs = [world.start(deployment, count=10, seconds=0.5) for _ in range(RUNS)]
    most, waiting = 0, set(runs)
    while waiting and time.time() < began + 1800:
        time.sleep(2)
        clusters = {each["metadata"]["name"] for each in world.watch.now.objects if each["kind"] == "DaskCluster"}
        most = max(most, len(clusters))
        waiting = {each for each in waiting if world.look(each).get("state_type") not in FINAL}
    seconds = time.time() - began
    states = Counter(world.look(each)["state_name"] for each in runs)
    times = [world.times_done(each) for each in runs]
    lost, twice = sum(10 - len(each) for each in times), sum(n > 1 for each in times for n in each.values())
    for each in runs:
        clean(Trial(world, Row(nothing_to_do, (), 0.0), each))
    result = (
        f"{states['Completed']} of {RUNS} Completed in {seconds:.0f} s, {most} clusters at a time; "
        f"{lost} items lost, {twice} done twice"
    )
    record(world, f"{RUNS} runs with a Dask cluster each, at once", before, result=result)
    assert states == {"Completed": RUNS}
    assert (lost, twice) == (0, 0)


@pytest.mark.timeout(0)
def test_ten_thousand_items_in_batches(world: World) -> None:
    before = memory(world.platform.namespace)
    deployment = world.deployment("load-items", entrypoint="chaos_flows.batches")
    began = time.time()
    run_id = world.start(deployment, count=ITEMS)
    run = world.platform.wait(run_id, 1200)
    seconds = time.time() - began
    times = world.times_done(run_id)
    twice = sum(n > 1 for n in times.values())
    result = f"{run['state_name']} in {seconds:.0f} s; {ITEMS - len(times)} items lost, {twice} done twice"
    record(world, f"a batched map of {ITEMS:,} items", before, result=result)
    assert run["state_type"] == "COMPLETED", run["state"]
    assert (len(times), twice) == (ITEMS, 0)


class FakeWorkers:
    """Threads that take due runs of a pool as Prefect workers do, and report the states of drivers that do nothing."""

    def __init__(self, api: str, pool: str) -> None:
        # A port-forward may drop a connection.
        transport = httpx.HTTPTransport(retries=3, limits=httpx.Limits(max_connections=20))
        self.client = httpx.Client(base_url=api, auth=AUTH, timeout=60, transport=transport)
        self.pool = pool
        self.taken: Counter[str] = Counter()
        self.problems: list[str] = []
        self._end = threading.Event()
        self._drivers = ThreadPoolExecutor(40)
        self._pollers = [threading.Thread(target=self._poll, daemon=True) for _ in range(FAKE_WORKERS)]

    def __enter__(self) -> Self:
        for each in self._pollers:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for each in self._pollers:
            each.join()
        self._drivers.shutdown()
        self.client.close()

    def _poll(self) -> None:
        path, submitted = f"work_pools/{self.pool}/get_scheduled_flow_runs", set()
        while not self._end.wait(2):
            try:
                answer = self.client.post(path, json={"scheduled_before": datetime.now(UTC).isoformat()})
                due = [each["flow_run"]["id"] for each in answer.raise_for_status().json()]
            except httpx.HTTPError as error:
                self.problems.append(repr(error))
                continue
            for run_id in set(due) - submitted:
                submitted.add(run_id)
                self._drivers.submit(self._run, run_id)

    def _run(self, run_id: str) -> None:
        try:
            if self._propose(run_id, "PENDING") == "ACCEPT":
                self.taken[run_id] += 1
                self._propose(run_id, "RUNNING")
                time.sleep(FAKE_SECONDS)
                self._propose(run_id, "COMPLETED")
        except httpx.HTTPError as error:
            self.problems.append(f"{run_id}: {error!r}")

    def _propose(self, run_id: str, state: str) -> str:
        body = {"state": {"type": state, "name": state.capitalize()}}
        return str(self.client.post(f"flow_runs/{run_id}/set_state", json=body).raise_for_status().json()["status"])


@pytest.mark.timeout(0)
def test_two_hundred_deployments_every_minute(world: World) -> None:
    platform = world.platform
    platform.post("work_pools/", {"name": "load", "type": "process"})
    try:
        flow = platform.post("flows/", {"name": "chaos-load"})["id"]
        schedule = {
            "schedule": {"interval": 60, "anchor_date": "2026-01-01T00:00:00Z", "timezone": "UTC"},
            "active": True,
        }
        # Each has a second of its own, so that not all are due at the same time.
        for number in range(DEPLOYMENTS):
            own = {**schedule["schedule"], "anchor_date": f"2026-01-01T00:00:{number % 60:02}Z"}
            platform.post(
                "deployments/",
                {
                    "name": f"load-{number}", "flow_id": flow, "entrypoint": "none.py:none", "work_pool_name": "load",
                    "tags": [TAG], "schedules": [{**schedule, "schedule": own}],
                },
            )  # fmt: skip
        with FakeWorkers(platform.api, "load") as workers:
            # At first the server creates the runs of all deployments.
            until(lambda: _deployments_done(world), lambda done: done == DEPLOYMENTS, seconds=300)
            before = memory(platform.namespace)
            began = datetime.now(UTC)
            time.sleep(MINUTES * 60)  # the time that is measured
            ended = datetime.now(UTC)
            with suppress(AssertionError):  # what is not final after that is shown below
                until(lambda: _scheduled(world, began, ended), _all_final, seconds=120)
            after_the_end = _scheduled(world, began, ended)
        states = Counter(each["state_name"] for each in after_the_end)
        wanted = DEPLOYMENTS * (ended - began) / timedelta(minutes=1)
        double = sum(times > 1 for times in workers.taken.values()) + sum(
            each["run_count"] > 1 for each in after_the_end
        )
        late = max(_late(each) for each in after_the_end)
        result = (
            f"{states['Completed']} of {len(after_the_end)} runs Completed in {MINUTES:g} min "
            f"(by the schedules: {wanted:.0f}), {double} taken twice, latest start {late:.0f} s after its time"
        )
        record(world, f"{DEPLOYMENTS} deployments every minute, fake drivers", before, result=result)
        assert states == {"Completed": len(after_the_end)}, workers.problems[:5]
        assert abs(len(after_the_end) - wanted) <= DEPLOYMENTS, "each deployment may have a run at either edge"
        assert double == 0
    finally:
        for each in platform.post("deployments/filter", {"deployments": {"tags": {"all_": [TAG]}}, "limit": PAGE}):
            # With its runs: on a busy machine longer than the database's time limit.
            until(lambda path=f"deployments/{each['id']}": _deleted(world, path), seconds=120)
        platform.delete("work_pools/load")


def _deleted(world: World, path: str) -> bool:
    try:
        world.platform.delete(path)
    except httpx.HTTPStatusError as error:
        return error.response.status_code == HTTPStatus.NOT_FOUND
    return True


def _deployments_done(world: World) -> int:
    """Return how many of the load's deployments have a Completed run."""
    query = {"deployments": {"tags": {"all_": [TAG]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    return int(world.platform.post("deployments/count", query))


def _all_final(runs: list[dict[str, Any]]) -> bool:
    return all(each["state_type"] in FINAL for each in runs)


def _late(run: dict[str, Any]) -> float:
    """Return how many seconds after its time a run began; infinite if it did not."""
    if run["start_time"] is None:
        return float("inf")
    began, due = (datetime.fromisoformat(run[field]) for field in ("start_time", "expected_start_time"))
    return (began - due).total_seconds()


def _scheduled(world: World, began: datetime, ended: datetime) -> list[dict[str, Any]]:
    """Return all runs of the load's deployments that were scheduled in a time."""
    between = {"after_": began.isoformat(), "before_": ended.isoformat()}
    found: list[dict[str, Any]] = []
    while True:
        query = {
            "flow_runs": {"expected_start_time": between, "tags": {"all_": [TAG]}},
            "sort": "ID_DESC", "limit": PAGE, "offset": len(found),
        }  # fmt: skip
        page = world.platform.post("flow_runs/filter", query)
        found += page
        if len(page) < PAGE:
            return found
